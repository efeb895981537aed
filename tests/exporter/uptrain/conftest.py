"""Fixtures of this folder: a checkpoint with a text to train on, and runs of a few steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from exporter.uptrain import UptrainOptions, uptrain

WORDS = ("the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sees", "2", "9")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """About 9,000 tokens of the tiny tokenizer, one a character."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 2200)) + ".\n", "utf-8")
    return path


@pytest.fixture
def few(text: Path):
    """Options of a run of six steps, with changes."""

    def make(**changes) -> UptrainOptions:
        given = {"data": (str(text),), "steps": 6, "batch": 4, "window": 24, "lr": 3e-3, "dtype": "fp32", "held_out": 3}
        return UptrainOptions(**{**given, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def run(saved: Path, tmp_path: Path, few):
    """Trains `saved` into a folder of that name; its path."""

    def go(name: str = "out", **changes) -> Path:
        uptrain(saved, tmp_path / name, few(**changes))
        assert not (tmp_path / f"{name}.run").exists()
        return tmp_path / name

    return go


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """`saved`, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
