"""Weights quantised in blocks, rounded to the nearest: what graphs/quantise.py has a graph read.

Per block of 32 inputs the scale is the value of largest magnitude over −2^(bits−1), so that this value, whatever its sign, is
met exactly and every level has a use, as in llama.cpp's Q4_0; q = round(w / scale) + 2^(bits−1).
"""

from __future__ import annotations

import functools

import torch

from exporter.checkpoint.expected import EMBEDDING, HEAD
from exporter.checkpoint.safetensors_io import refuse_non_finite
from exporter.config import ModelConfig
from exporter.errors import UserError
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import ComputedTensor, LazyTensor, Weights
from graphs.quantise import BITS, BLOCK, parts

QUANTIZE = tuple(BITS)


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


def replaced(weights: Weights, kind: str | None) -> list[str]:
    """The names of what a Quantiser replaced."""
    return [name.removesuffix(f".{kind}") for name in weights if name.endswith(f".{kind}")]


class Quantiser:
    """Puts two tensors, q and its scales, in the place of every matrix of a linear layer, of the embedding and of the output
    head. Variants that share a weight share what is made of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[LazyTensor, tuple[LazyTensor, LazyTensor]] = {}

    def __call__(self, weights: Weights) -> Weights:
        result = dict(weights)
        for name, tensor in weights.items():
            if _is_matrix(name):
                if tensor not in self._known:
                    self._known[tensor] = _lazily(tensor, self.kind)
                del result[name]
                result |= zip(parts(name, self.kind), self._known[tensor], strict=True)
        return result


def rounded(weights: Weights, kind: str) -> Weights:
    """`weights` with the values that a Quantiser's stand for, in float32: for runtimes without quantised products."""
    result = dict(weights)
    for name, tensor in weights.items():
        if _is_matrix(name):
            result[name] = ComputedTensor(name, torch.float32, tensor.shape, functools.partial(_round, tensor, kind))
    return result


def _round(tensor: LazyTensor, kind: str) -> torch.Tensor:
    return dequantise(*quantise(tensor.read(), kind), kind)


def _is_matrix(name: str) -> bool:
    return name in (EMBEDDING, HEAD) or name.endswith("_proj.weight")


def _lazily(tensor: LazyTensor, kind: str) -> tuple[LazyTensor, LazyTensor]:
    N, K = tensor.shape
    blocks = K // BLOCK
    both = functools.partial(_quantise, tensor, kind)
    shape = (N, blocks, BLOCK * BITS[kind] // 8)
    q, scales = parts(tensor.name, kind)
    return (
        ComputedTensor(q, torch.uint8, shape, lambda: both()[0]),
        ComputedTensor(scales, torch.float32, (N, blocks), lambda: both()[1]),
    )


def _quantise(tensor: LazyTensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raises CheckpointError where a weight is NaN or infinite: what is made of it has a name that no checkpoint knows."""
    weight = tensor.read()
    refuse_non_finite(tensor.name, weight)
    return quantise(weight, kind)


def quantise(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[N,K] → q uint8 [N, K/32, 4·bits] and scales float32 [N, K/32]."""
    middle = 1 << (BITS[kind] - 1)
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    places = blocks.abs().argmax(dim=2, keepdim=True)
    scales = blocks.gather(2, places) / -middle
    safe = torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 1, scales)  # of a block of zeros
    q = (blocks / safe).round().clamp(-middle, middle - 1).add(middle).to(torch.uint8)
    if kind == "int4":
        q = q[:, :, 0::2] | q[:, :, 1::2] << 4
    return q.contiguous(), scales.squeeze(2)


def dequantise(q: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """What `quantise` gave → float32 [N,K]."""
    if kind == "int4":
        q = torch.stack((q & 15, q >> 4), dim=3).flatten(2)
    return ((q.float() - (1 << (BITS[kind] - 1))) * scales.unsqueeze(2)).flatten(1)
