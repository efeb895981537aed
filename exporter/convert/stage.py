"""The convert stage: a checkpoint in, a Hugging Face checkpoint with other KV heads out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from exporter.checkpoint import open_checkpoint, write_checkpoint
from exporter.config import ModelConfig, check_groups
from exporter.convert.heads import Method, convert_weights
from exporter.files import refuse_existing
from exporter.tokenizer import check_tokenizer


def convert_checkpoint(
    path: Path,
    out: Path,
    kv_heads: int,
    method: Method = "mean",
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[ModelConfig, ModelConfig]:
    """Write `path` to the folder `out` with `kv_heads` KV heads in every layer; the configs before and after.

    The input is only read. `out` must not exist and is whole or absent. Raises CheckpointError and UserError.
    """
    checkpoint = open_checkpoint(path)
    check_groups(checkpoint.config.num_heads, kv_heads)
    refuse_existing(out)
    check_tokenizer(checkpoint.side_files, str(path))
    config, weights = convert_weights(checkpoint.config, checkpoint.weights, kv_heads, method, seed)
    total = sum(tensor.nbytes for tensor in weights.values())
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress("writing weights", done, total)

    write_checkpoint(dataclasses.replace(checkpoint, config=config, weights=weights), out, on_bytes=wrote)
    return checkpoint.config, config
