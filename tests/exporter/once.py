"""What takes long and several of the tests' processes need: the first that comes makes it, and the others wait."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path


def made_once(out: Path, make: Callable[[Path], object]) -> Path:
    """`out`, which `make` writes where it is not there yet, in a folder of all of these processes (the fixture `shared`)."""
    with out.with_name(f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            make(out)
    return out


def headpool(*words: object) -> None:
    """A command, which succeeds."""
    from exporter.cli import _run

    assert _run([str(word) for word in words]) == 0
