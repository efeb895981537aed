"""Text files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import UserError
from exporter.files import new_file


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, which must not exist. Raises UserError, and then leaves nothing behind."""
    try:
        with new_file(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
