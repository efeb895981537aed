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
    """An output is never written over, and its folder must be there: known before the work that makes it."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists; choose another name or remove it")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{path} cannot be written: {parent} is not a folder; make it first, or choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {parent} is read-only; choose another place")


def check_output(out: Path, source: Path) -> None:
    """An output that is not there yet, and not in the folder that is read: inputs are left as they are."""
    refuse_existing(out)
    if source.is_dir() and source.resolve() in out.resolve().parents:
        raise UserError(f"{out} is inside {source}, which is only read; choose a place outside it")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends, and vanishes when it raises."""
    refuse_existing(path)
    temporary = _name_beside(path)
    try:
        with _one_line(path):
            temporary.mkdir()
            yield temporary
            refuse_existing(path)
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, UserError):  # in the names that the user knows
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a file name beside `path` that becomes `path` when the block ends, and vanishes when it raises."""
    refuse_existing(path)
    with replacing(path) as temporary:
        yield temporary
        refuse_existing(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file name beside `path` that takes its place in one step when the block ends, and vanishes when it raises."""
    temporary = _name_beside(path)
    try:
        with _one_line(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:  # an interrupt too leaves nothing half-written
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No second call works in `folder` at the same time; what a killed one left half-written is removed first.

    Raises UserError.
    """
    with _one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":  # which has no such locks
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use: another call is at work there; wait for it, or stop it") from None
        try:
            with _one_line(folder):
                for left in folder.glob(".*.partial"):
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
            yield
        finally:
            with contextlib.suppress(OSError):  # where there is something in it
                folder.rmdir()
    finally:
        os.close(handle)  # which unlocks it


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, which must not exist. Raises UserError, and then leaves nothing behind."""
    with new_file(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def _name_beside(path: Path) -> Path:
    return path.absolute().parent / f".{path.absolute().name}.{secrets.token_hex(4)}.partial"


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """A full disk or a read-only folder is the user's to mend, not a traceback."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{path} cannot be written: {error.strerror or error}{place}") from error
