"""Fixtures of this folder: a checkpoint, a bundle and results, and the command line that tests run on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.cli import _run


@pytest.fixture(scope="session")
def made(saved: Path, tmp_path_factory, small_probe: None) -> Path:
    """model/ (with a tokenizer), bundle/ (g2 and g1) and fast.json (latency of bundle's g2), only to be read."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(saved, folder / "model")
    arguments = ["--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1"]
    for command in (
        ["export", folder / "model", folder / "bundle", "--groups", "2,1"],
        ["profile", folder / "bundle", "--variants", "g2", *arguments, "--out", folder / "fast.json"],
    ):
        assert _run([str(word) for word in command]) == 0
    return folder


@pytest.fixture
def headpool(capfd):
    """Runs a command line in this process; (exit code, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = _run([str(word) for word in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(headpool, snapshot, made: Path, tmp_path: Path, monkeypatch):
    """The message of a command that must fail, run in an empty folder: one line, code 2, nothing written or changed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> str:
        before = snapshot(tmp_path, made)
        code, out, err = headpool(*arguments)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("headpool: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert snapshot(tmp_path, made) == before
        return err.removeprefix("headpool: ").rstrip("\n")

    return run
