"""Outputs that appear whole or not at all: written beside their place under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from exporter.errors import CheckpointError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends and vanishes when it fails. `out` must not exist."""
    temporary = _sibling(out)
    try:
        with _one_line(out):
            temporary.mkdir()
            yield temporary
            os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(out: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `out` when the block ends and vanishes when it fails. `out` must not exist."""
    temporary = _sibling(out)
    try:
        with _one_line(out):
            with open(temporary, "xb") as file:
                yield file
            os.rename(temporary, out)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _sibling(out: Path) -> Path:
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists; choose another name or remove it")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {out}: the folder {out.absolute().parent} does not exist")
    return out.absolute().parent / f".{out.absolute().name}.{os.getpid()}.tmp"


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """A full disk or a read-only folder is the user's to mend, not a traceback."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}{place}") from error
