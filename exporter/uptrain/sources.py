"""Where text comes from: files of text or JSON lines, and whatever Hugging Face's `datasets` loads."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from exporter.errors import UserError

PIECE = 1 << 20  # characters of a text file that are read at once
HUB = "hf:"
LINES = (".jsonl", ".ndjson")
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json"}  # of datasets, by a file's suffix

Piece = tuple[str, bool]  # text, and whether a document ends behind it


def pieces(sources: Iterable[str], field: str) -> Iterator[Piece]:
    """The text of all `sources` in turn, never a whole file of it in memory.

    A source is a UTF-8 text file, which is one document; a .jsonl file, a document a line in its `field`; a .parquet, .csv,
    .json or .arrow file; or `hf:PATH[:CONFIG[:SPLIT]]`, what `datasets` loads under that name or from that folder (split
    train). Raises UserError.
    """
    for source in sources:
        if source.startswith(HUB):
            yield from _rows(source, _load(source), field)
        elif not (path := Path(source)).is_file():
            own = f"{HUB}{source} for a folder of datasets'" if path.is_dir() else f"{HUB}NAME for datasets' own"
            raise UserError(f"data {source!r} is not a file; give a text file, a .jsonl file, or {own}")
        elif path.suffix.lower() in LINES:
            yield from _lines(path, field)
        elif path.suffix.lower() in BUILDERS:
            yield from _rows(source, _load(f"{HUB}{BUILDERS[path.suffix.lower()]}", str(path)), field)
        else:
            yield from _text(path)


def _text(path: Path) -> Iterator[Piece]:
    """In pieces that end with a line, so that tokens are those of the whole."""
    text = ""
    try:
        with open(path, encoding="utf-8") as file:
            while piece := file.read(PIECE):
                text = piece + file.readline()
                yield text, False
    except UnicodeDecodeError:
        raise UserError(f"data {path} is not UTF-8 text") from None
    if text:  # an empty file is no document
        yield "", True


def _lines(path: Path, field: str) -> Iterator[Piece]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _document(json.loads(line), field, f"{path}, line {number}"), True
    except UnicodeDecodeError:
        raise UserError(f"data {path} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"data {path}, line {number} is not JSON: {error.msg}") from None


def _rows(source: str, rows: Iterable[Any], field: str) -> Iterator[Piece]:
    for number, row in enumerate(rows, 1):
        yield _document(row, field, f"{source}, row {number}"), True


def _document(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ", nor any: it is no object"
        raise UserError(f"data {where} has no text in the field {field!r}{keys}")
    return text


def _load(source: str, file: str | None = None) -> Iterable[Any]:
    """The rows, streamed: only what is read is fetched."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data {file or source} needs the datasets package: pip install 'headpool[uptrain]'") from None
    name, config, split = (*source.removeprefix(HUB).split(":", 2), "", "")[:3]
    split = split or "train"
    try:
        with _quiet_hub():
            if file is not None:
                return datasets.load_dataset(name, data_files=file, split=split, streaming=True)
            if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(name)
                return saved[split] if isinstance(saved, dict) else saved
            return datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # whatever its builders and the network raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"data {file or source} cannot be loaded: {reason}") from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without huggingface_hub's lines for each of its tries: what came of them is said once, by the error."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
