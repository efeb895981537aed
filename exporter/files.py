"""Outputs that are whole or absent: written to a temporary sibling, renamed into place."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from exporter.errors import UserError


def refuse_existing(path: Path) -> None:
    """An output is never written over."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; choose another name or remove it")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends, and vanishes when it raises."""
    refuse_existing(path)
    temporary = _sibling(path)
    temporary.mkdir(mode=0o755)
    try:
        yield temporary
        refuse_existing(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a file name beside `path` that becomes `path` when the block ends, and vanishes when it raises."""
    if not replace:
        refuse_existing(path)
    temporary = _sibling(path)
    try:
        yield temporary
        if not replace:
            refuse_existing(path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sibling(path: Path) -> Path:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} is not a folder; make it first, or choose another place for {path.name}")
    return parent / f".{path.name}.{secrets.token_hex(4)}.partial"
