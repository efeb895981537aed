"""OUT.run, what a run keeps beside its output while it is not done: its settings, its tokens, its figures, its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.errors import UserError, option
from exporter.files import new_folder
from exporter.tokenizer import Tokenizer
from exporter.uptrain.options import UptrainOptions
from exporter.uptrain.sources import pieces
from exporter.uptrain.tokens import DTYPE, Windows, write_tokens

SETTINGS, TOKENS = "run.json", "tokens.bin"

Progress = Callable[[str, int, int], None]  # what, done, total


def run_folder(out: Path) -> Path:
    """Beside `out`."""
    return out.absolute().with_name(f"{out.absolute().name}.run")


def prepare(
    folder: Path, checkpoint: Checkpoint, teacher: Checkpoint | None, options: UptrainOptions, progress: Progress
) -> None:
    """Make the folder, its tokens read once and for all; or see that the one there is of this very run. Raises UserError."""
    settings: dict[str, Any] = {
        "options": options.identity(),
        "model": fingerprint(checkpoint),
        "teacher": fingerprint(teacher) if teacher is not None else None,
    }
    if folder.exists():
        _check_same(folder, json.loads(json.dumps(settings)))
        return
    limit = (options.held_out + options.total_steps * options.batch) * options.window + 1
    tokenizer = Tokenizer.from_files(checkpoint.side_files, checkpoint.name)
    end = next(iter(checkpoint.config.eos_token_ids), None)
    with new_folder(folder) as partial:
        written = write_tokens(
            partial / TOKENS,
            pieces(options.data, options.field),
            tokenizer,
            checkpoint.config.vocab_size,
            end,
            limit,
            lambda done: progress("reading data", done, limit),
        )
        if not written:
            raise UserError(f"data {', '.join(options.data)} is empty; give some text")
        settings["tokens"] = written
        Windows.open(partial / TOKENS, options.window, options.held_out, options.seed)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells it from others."""
    return {"config": dataclasses.asdict(checkpoint.config), "sha256": checkpoint.kv_digest()}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    anew = f"give what it was begun with to go on, or remove {folder} to begin anew"
    path = folder / TOKENS
    try:
        there = json.loads((folder / SETTINGS).read_text("utf-8"))
        options, tokens = there["options"], int(there["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run that can be read ({type(error).__name__}); remove it to begin anew") from None
    for name, value in settings["options"].items():
        if options.get(name) != value:
            held, asked = (",".join(map(str, v)) if isinstance(v, list) else v for v in (options.get(name), value))
            raise UserError(f"{folder} holds a run with {option(name)} {held}, not {asked}; {anew}")
    for name in ("model", "teacher"):
        if there.get(name) != settings[name]:
            raise UserError(f"{folder} holds a run of another {name}; {anew}")
    if not path.is_file() or path.stat().st_size != tokens * DTYPE.itemsize:
        raise UserError(f"{path} is damaged, it does not hold the run's {tokens} tokens; remove {folder} to begin anew")
