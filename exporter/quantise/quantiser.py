"""Converted weights on their way into a bundle: every matrix in its quantised form, rounded to the nearest or by GPTQ."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.expected import EMBEDDING, HEAD
from exporter.checkpoint.safetensors_io import refuse_non_finite
from exporter.config import ModelConfig
from exporter.convert import Converter
from exporter.errors import UserError
from exporter.quantise.blocks import dequantise, quantise
from exporter.quantise.calibrated import Stored, calibrated
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import ComputedTensor, LazyTensor, Weights
from graphs.quantise import BLOCK, FORMS, Form

QUANTIZE = tuple(FORMS)


class Quantiser:
    """Puts its parts, q, scales and maybe zeros, in the place of every matrix of a linear layer, of the embedding and of the
    output head of what `convert` gives.

    Where there are tokens to calibrate on, layers and head are rounded by GPTQ, anew for each number of KV heads. What is
    rounded to the nearest the variants that share the weight share, too.
    """

    def __init__(self, convert: Converter, kind: str) -> None:
        self.convert, self.form = convert, FORMS[kind]
        self._known: dict[LazyTensor, Stored] = {}
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
        found = {} if tokens is None else calibrated(config, weights, self.form, tokens, self.convert.progress)
        result = dict(weights)
        for name, tensor in weights.items():
            if _is_matrix(name):
                del result[name]
                result |= zip(self.form.parts(name), found.get(name) or self._nearest(tensor), strict=True)
        return result

    def _nearest(self, tensor: LazyTensor) -> Stored:
        if tensor not in self._known:
            self._known[tensor] = _lazily(tensor, self.form)
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


def quantised_names(weights: Weights, form: Form) -> list[str]:
    """The names of what a Quantiser replaced."""
    suffix = form.parts("")[0]
    return [name.removesuffix(suffix) for name in weights if name.endswith(suffix)]


def restored(weights: Weights, form: Form) -> Weights:
    """What a Quantiser's `weights` stand for, in float32 and by their old names: for runtimes without quantised products."""
    result = dict(weights)
    for name in quantised_names(weights, form):
        stored = [result.pop(part) for part in form.parts(name)]
        N, blocks, width = stored[0].shape
        shape = (N, blocks * width * 8 // form.bits)
        result[name] = ComputedTensor(name, torch.float32, shape, functools.partial(_restore, stored, form))
    return result


def _restore(stored: Sequence[LazyTensor], form: Form) -> Tensor:
    return dequantise(tuple(tensor.read() for tensor in stored), form)


def _is_matrix(name: str) -> bool:
    return name in (EMBEDDING, HEAD) or name.endswith("_proj.weight")


def _lazily(tensor: LazyTensor, form: Form) -> Stored:
    N, K = tensor.shape
    dtypes = (torch.uint8, torch.float32, torch.uint8)
    described = zip(form.parts(tensor.name), dtypes, form.shapes(N, K), strict=False)
    return tuple(
        ComputedTensor(name, dtype, shape, functools.partial(_part, tensor, form, index))
        for index, (name, dtype, shape) in enumerate(described)
    )


def _part(tensor: LazyTensor, form: Form, index: int) -> Tensor:
    """Raises CheckpointError where a weight is NaN or infinite: what is made of it has a name that no checkpoint knows."""
    weight = tensor.read()
    refuse_non_finite(tensor.name, weight)
    return quantise(weight, form)[index]
