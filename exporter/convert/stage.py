"""The convert stage: a checkpoint in, a Hugging Face checkpoint with other KV heads out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from exporter.config import ModelConfig, check_groups
from exporter.convert.calibration import calibration_tokens
from exporter.convert.gates import gated_config
from exporter.convert.methods import SHARINGS, Grouping, Method, check_method, convert_weights, is_exact
from exporter.convert.seq2seq import default_calibration
from exporter.files import check_output
from exporter.tokenizer import check_tokenizer
from exporter.weights import Weights

Progress = Callable[[str, int, int], None]  # what, done, total


class Converter:
    """One checkpoint to any numbers of KV heads, each once: calibration tokens and converted layers are kept.

    `calibration` is what `calibration_tokens` takes; None is `self` for the methods that read tokens. `glu_value_dim` gives
    them GLU attention too (exporter/convert/gates.py). `quantised` is whether what it gives will be quantised: then every
    method may have calibration tokens, for that.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method = "mean",
        seed: int = 0,
        grouping: Grouping = "contiguous",
        calibration: str | None = None,
        progress: Progress = lambda what, done, total: None,
        glu_value_dim: int | None = None,
        quantised: bool = False,
    ) -> None:
        check_method(checkpoint.config, method, seed, grouping, calibration, quantised)
        self.glu_value_dim = glu_value_dim
        self.checkpoint, self.method, self.seed, self.grouping, self.progress = checkpoint, method, seed, grouping, progress
        self.calibration = calibration
        if calibration is None and method in SHARINGS:
            self.calibration = default_calibration(checkpoint.config)
        self._tokens: np.ndarray | None = None
        self._made: dict[tuple[int, ...], tuple[ModelConfig, Weights]] = {}

    def __call__(self, kv_heads: int | tuple[int, ...]) -> tuple[ModelConfig, Weights]:
        """The config and weights with `kv_heads`, as `convert_weights` gives them."""
        config, weights = self.checkpoint.config, self.checkpoint.weights
        target = config.with_kv_heads(kv_heads)
        if target.kv_heads not in self._made:
            exact = is_exact(config, target) and self.glu_value_dim in (None, config.head_dim)
            tokens = None if exact or self.method not in SHARINGS else self.tokens()
            self._made[target.kv_heads] = convert_weights(
                config,
                weights,
                target.kv_heads,
                self.method,
                self.seed,
                grouping=self.grouping,
                tokens=tokens,
                progress=self.progress,
                glu_value_dim=self.glu_value_dim,
            )
        return self._made[target.kv_heads]

    def tokens(self) -> np.ndarray | None:
        """int64 [n,T], all that one command measures on; None where there is nothing to."""
        if self._tokens is None and self.calibration is not None:
            self._tokens = calibration_tokens(self.checkpoint, self.calibration, self.seed, self.progress)
        return self._tokens


def convert_checkpoint(
    path: Path,
    out: Path,
    kv_heads: int | tuple[int, ...] | None,
    method: Method = "mean",
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    *,
    grouping: Grouping = "contiguous",
    calibration: str | None = None,
    glu_value_dim: int | None = None,
) -> tuple[ModelConfig, ModelConfig]:
    """Write `path` to the folder `out` with `kv_heads` KV heads in every layer, or one number a layer (None: as many as there
    are), with GLU attention where `glu_value_dim` is given; the configs before and after.

    The input is only read. `out` must not exist and is whole or absent. Raises CheckpointError and UserError.
    """
    checkpoint = open_checkpoint(path)
    if isinstance(kv_heads, int):
        check_groups(checkpoint.config.num_heads, kv_heads)
    if glu_value_dim is not None:
        gated_config(checkpoint.config, glu_value_dim)
    check_output(out, path)
    check_tokenizer(checkpoint.side_files, str(path))
    convert = Converter(checkpoint, method, seed, grouping, calibration, progress, glu_value_dim)
    config, weights = convert(checkpoint.config.kv_heads if kv_heads is None else kv_heads)
    total = sum(tensor.nbytes for tensor in weights.values())
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress("writing weights", done, total)

    write_checkpoint(dataclasses.replace(checkpoint, config=config, weights=weights), out, on_bytes=wrote)
    return checkpoint.config, config
