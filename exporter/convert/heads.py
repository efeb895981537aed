"""MHA → GQA-G by pooling KV heads, as in "GQA" (Ainslie et al. 2023, arXiv 2305.13245, section 2.1 and figure 4).

Query head h reads KV head h // R, so the heads pooled into one are contiguous. From G to G' KV heads, both divisors of H:

1. degroup to the least common multiple L of G and G', each head repeated L / G times. Exact: every query head still reads
   the values it read before, and L divides H because G and G' do.
2. pool each run of L / G' heads into one. Nothing is lost where the run repeats one head, so G' a multiple of G is exact.

Only K and V projections change, weights [G·D, d] and biases [G·D] alike, and they are computed when they are read. Every
other tensor is the object that came in. QK-norm weights have D entries that all heads share, so they stay as they are: K is
pooled before its norm, which then gives the pooled head the scale that the trained heads had.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch

from exporter.config import ModelConfig
from exporter.errors import CheckpointError, UserError, one_of
from exporter.weights import ComputedTensor, LazyTensor, Weights

Method = Literal["mean", "first", "random"]
METHODS: tuple[Method, ...] = get_args(Method)


def convert_weights(
    config: ModelConfig, weights: Weights, kv_heads: int | tuple[int, ...], method: Method = "mean", seed: int = 0
) -> tuple[ModelConfig, Weights]:
    """The model with `kv_heads` KV heads in every layer, or one number a layer.

    `mean` averages the heads of a group, `first` keeps the first one, `random` keeps one that `seed` and the layer number
    choose, the same for K and V. Layers that keep their number keep their tensors. Raises UserError for a count that does not
    divide the query heads, CheckpointError where a projection is missing or has another shape than the config says.
    """
    if method not in METHODS:
        raise UserError(one_of("method", method, METHODS))
    if seed < 0:
        raise UserError(f"seed {seed} is negative; choose a whole number from 0")
    target = config.with_kv_heads(kv_heads)
    converted = dict(weights)
    for layer, (before, after) in enumerate(zip(config.kv_heads, target.kv_heads, strict=True)):
        if before == after:
            continue
        source = _source_heads(before, after, method, np.random.default_rng([seed, layer]))
        for tensor in _projections(config, weights, layer):
            shape = (after * config.head_dim, *tensor.shape[1:])
            compute = partial(_pool, tensor, source, config.head_dim)
            converted[tensor.name] = ComputedTensor(tensor.name, tensor.dtype, shape, compute)
    return target, converted


def conversion_record(before: ModelConfig, after: ModelConfig, method: Method, seed: int = 0) -> dict[str, Any] | None:
    """What a manifest says of a conversion: method, seed and KV heads per layer. None where no head changed."""
    if before.kv_heads == after.kv_heads:
        return None
    return {
        "method": method,
        "seed": seed if method == "random" else None,
        "kv_heads_before": list(before.kv_heads),
        "kv_heads_after": list(after.kv_heads),
    }


def _source_heads(before: int, after: int, method: Method, rng: np.random.Generator) -> np.ndarray:
    """Which old heads are averaged into each new one: int [after, n], an index repeated where a head weighs more."""
    common = math.lcm(before, after)
    groups = np.repeat(np.arange(before), common // before).reshape(after, -1)
    if method == "first":
        return groups[:, :1]
    if method == "random":
        return np.take_along_axis(groups, rng.integers(groups.shape[1], size=(after, 1)), axis=1)
    return groups


def _projections(config: ModelConfig, weights: Weights, layer: int) -> list[LazyTensor]:
    """K and V weights of one layer, and their biases where there are any; their rows checked against the config."""
    prefix = f"model.layers.{layer}.self_attn."
    names = [f"{prefix}{letter}_proj.{kind}" for letter in "kv" for kind in ("weight", "bias")]
    if missing := [name for name in names if name.endswith("weight") and name not in weights]:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}")
    found = [weights[name] for name in names if name in weights]
    rows = config.kv_heads[layer] * config.head_dim
    for tensor in found:
        if tensor.shape[0] != rows:
            raise CheckpointError(
                f"{tensor.name} has {tensor.shape[0]} rows, its config says {rows}: "
                f"{config.kv_heads[layer]} KV heads of {config.head_dim}"
            )
    return found


def _pool(tensor: LazyTensor, source: np.ndarray, head_dim: int) -> torch.Tensor:
    """The mean of the named heads, summed in float64: equal heads give themselves back to the bit."""
    heads = tensor.read().reshape(-1, head_dim, *tensor.shape[1:])
    index = torch.from_numpy(source)
    if source.shape[1] == 1 or bool((source == source[:, :1]).all()):
        return heads[index[:, 0]].flatten(0, 1)
    total = heads[index[:, 0]].double()
    for column in index.T[1:]:
        total += heads[column]
    return (total / source.shape[1]).to(tensor.dtype).flatten(0, 1)
