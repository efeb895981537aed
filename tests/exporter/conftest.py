"""Fixtures of this folder: a saved checkpoint, and what lies on a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf
import pytest

from exporter.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The tiny llama with a tokenizer; only to be read."""
    folder = hf.save("llama", tmp_path_factory.mktemp("saved"))
    hf.add_tokenizer(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path) -> Checkpoint:
    return open_checkpoint(saved)


@pytest.fixture(scope="session")
def snapshot() -> Callable[..., dict[str, Any]]:
    """A function of folders: the content, time and mode of every file in them, to be compared."""

    def take(*folders: Path) -> dict[str, Any]:
        return {
            str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_mode)
            if path.is_file()
            else "folder"
            for folder in folders
            for path in sorted(folder.rglob("*"))
        }

    return take
