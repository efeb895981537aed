"""What is done to one layer: KV heads repeated where counts do not divide, put in order, shared, folded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.fold import fold, rotating
from exporter.convert.partition import best_order
from exporter.convert.sharing import Sharing
from exporter.errors import CheckpointError
from exporter.weights import Weights


@dataclass(frozen=True)
class LayerChange:
    """`partition` looks for the best groups (else they are contiguous), `correct` follows sharing with least squares.

    `value_dim` is how many channels the values of a head have after (None: as many as before).
    """

    sharing: Sharing
    partition: bool
    correct: bool
    seed: int
    value_dim: int | None = None

    def keeps(self, before: int, after: int) -> bool:
        """Whether a layer of `before` KV heads that is to have `after` stays as it is."""
        return before == after and self.value_dim is None

    def regroup(self, config: ModelConfig, layer: AttentionWeights, kv_heads: int, moments: Tensor) -> AttentionWeights:
        """The same attention with a multiple of `kv_heads` KV heads, in the order in which they are to share."""
        layer = layer.degrouped(math.lcm(layer.kv_heads, kv_heads))
        if not self.partition:
            return layer
        return layer.ordered(best_order(layer, kv_heads, rotating(config), moments, self.seed))

    def fold(self, config: ModelConfig, layer: AttentionWeights, kv_heads: int, moments: Tensor) -> AttentionWeights:
        """What `regroup` gave with `kv_heads` KV heads; the same where it has as many and values keep their size."""
        if self.keeps(layer.kv_heads, kv_heads):
            return layer
        return fold(layer, kv_heads, rotating(config), self.sharing, moments, self.value_dim)


def expected_moments(config: ModelConfig, weights: Weights, layer: int) -> Tensor:
    """float64 [e,e]: second moments of a layer's inputs were its normalised hidden states white. No tokens are needed."""
    return _norm_moments(config, weights, f"model.layers.{layer}.input_layernorm.")


def query_moments(config: ModelConfig, weights: Weights, layer: int) -> Tensor | None:
    """The same of what queries read, where a norm of their own is among the weights: cross-attention has one."""
    prefix = f"model.layers.{layer}.query_layernorm."
    return _norm_moments(config, weights, prefix) if prefix + "weight" in weights else None


def _norm_moments(config: ModelConfig, weights: Weights, prefix: str) -> Tensor:
    gain = weights[prefix + "weight"].read().double() + config.norm_offset
    mean = weights[prefix + "bias"].read().double() if config.norm == "layer" else torch.zeros_like(gain)
    if config.qkv_bias:
        gain, mean = torch.cat([gain, gain.new_zeros(1)]), torch.cat([mean, mean.new_ones(1)])
    return torch.diag(gain**2) + torch.outer(mean, mean)


@contextlib.contextmanager
def solvable(layer: int) -> Iterator[None]:
    """A decomposition that fails, or ends in what is no number, is laid at the layer's door: CheckpointError."""
    try:
        yield
    except (torch.linalg.LinAlgError, _NotFinite) as error:
        raise CheckpointError(
            f"layer {layer} cannot be converted by least squares, its weights or what it reads are too large or too small "
            f"({str(error).splitlines()[0][:100]}); choose method mean, or check the checkpoint with 'headpool eval'"
        ) from error


class _NotFinite(ArithmeticError):
    """A result that float32 cannot hold, as `check_finite` tells `solvable`."""


def check_finite(folded: AttentionWeights, *outputs: Tensor) -> None:
    """Within `solvable`: refuse a layer whose weights, or what it gives, float32 cannot hold."""
    gates = () if folded.gate is None else (folded.gate,)
    tensors = (folded.query, folded.key, folded.value, *gates, folded.output, *outputs)
    if not all(bool(tensor.float().isfinite().all()) for tensor in tensors):
        raise _NotFinite("its values exceed float32")
