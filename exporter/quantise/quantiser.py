"""Converted weights on their way into a bundle: every matrix in its quantised form, rounded to the nearest or by GPTQ."""

from __future__ import annotations

import functools
from typing import Any

import torch

from exporter.checkpoint.expected import EMBEDDING, HEAD
from exporter.checkpoint.safetensors_io import refuse_non_finite
from exporter.config import ModelConfig
from exporter.convert import Converter
from exporter.errors import UserError
from exporter.quantise.blocks import dequantise, quantise
from exporter.quantise.calibrated import Pair, calibrated
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import ComputedTensor, LazyTensor, Weights
from graphs.quantise import BITS, BLOCK, parts

QUANTIZE = tuple(BITS)


class Quantiser:
    """Puts two tensors, q and its scales, in the place of every matrix of a linear layer, of the embedding and of the output
    head of what `convert` gives.

    Where there are tokens to calibrate on, layers and head are rounded by GPTQ, anew for each number of KV heads. What is
    rounded to the nearest the variants that share the weight share, too.
    """

    def __init__(self, convert: Converter, kind: str) -> None:
        self.convert, self.kind = convert, kind
        self._known: dict[LazyTensor, Pair] = {}
        self._made: dict[tuple[int, ...], tuple[ModelConfig, Weights]] = {}

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of how weights were rounded."""
        if self.convert.calibration in (None, "none"):
            return {"method": "nearest"}
        return {"method": "gptq", "calibration": self.convert.calibration, "seed": self.convert.seed}

    def __call__(self, kv_heads: int | tuple[int, ...]) -> tuple[ModelConfig, Weights]:
        config, weights = self.convert(kv_heads)
        if config.kv_heads not in self._made:
            self._made[config.kv_heads] = config, self._quantised(config, weights)
        return self._made[config.kv_heads]

    def _quantised(self, config: ModelConfig, weights: Weights) -> Weights:
        tokens = self.convert.tokens()
        found = {} if tokens is None else calibrated(config, weights, self.kind, tokens, self.convert.progress)
        result = dict(weights)
        for name, tensor in weights.items():
            if _is_matrix(name):
                del result[name]
                result |= zip(parts(name, self.kind), found.get(name) or self._nearest(tensor), strict=True)
        return result

    def _nearest(self, tensor: LazyTensor) -> Pair:
        if tensor not in self._known:
            self._known[tensor] = _lazily(tensor, self.kind)
        return self._known[tensor]


def check_quantise(config: ModelConfig) -> None:
    """Raises UserError where a matrix cannot be cut into blocks."""
    if isinstance(config, Seq2SeqConfig):
        raise UserError("weights of an encoder-decoder are not quantised; leave --quantize out")
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "the query heads' values": config.num_heads * config.value_dim,
    }
    for what, width in widths.items():
        if width % BLOCK:
            raise UserError(f"{what} is {width}, no multiple of {BLOCK}; such a model cannot be quantised in blocks of {BLOCK}")


def quantised_names(weights: Weights, kind: str | None) -> list[str]:
    """The names of what a Quantiser replaced."""
    return [name.removesuffix(f".{kind}") for name in weights if name.endswith(f".{kind}")]


def restored(weights: Weights, kind: str) -> Weights:
    """What a Quantiser's `weights` stand for, in float32 and by their old names: for runtimes without quantised products."""
    result = dict(weights)
    for name in quantised_names(weights, kind):
        q, scales = (result.pop(part) for part in parts(name, kind))
        shape = (scales.shape[0], scales.shape[1] * BLOCK)
        result[name] = ComputedTensor(name, torch.float32, shape, functools.partial(_restore, q, scales, kind))
    return result


def _restore(q: LazyTensor, scales: LazyTensor, kind: str) -> torch.Tensor:
    return dequantise(q.read(), scales.read(), kind)


def _is_matrix(name: str) -> bool:
    return name in (EMBEDDING, HEAD) or name.endswith("_proj.weight")


def _lazily(tensor: LazyTensor, kind: str) -> Pair:
    N, K = tensor.shape
    blocks = K // BLOCK
    both = functools.partial(_quantise, tensor, kind)
    q, scales = parts(tensor.name, kind)
    return (
        ComputedTensor(q, torch.uint8, (N, blocks, BLOCK * BITS[kind] // 8), lambda: both()[0]),
        ComputedTensor(scales, torch.float32, (N, blocks), lambda: both()[1]),
    )


def _quantise(tensor: LazyTensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raises CheckpointError where a weight is NaN or infinite: what is made of it has a name that no checkpoint knows."""
    weight = tensor.read()
    refuse_non_finite(tensor.name, weight)
    return quantise(weight, kind)
