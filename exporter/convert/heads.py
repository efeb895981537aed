"""MHA → GQA-G by pooling KV heads, as in "GQA" (Ainslie et al. 2023, arXiv 2305.13245, section 2.1 and figure 4).

Query head h reads KV head h // R, so the heads pooled into one are contiguous. From G to G' KV heads, both divisors of H:

1. degroup to the least common multiple L of G and G', each head repeated L / G times. Exact: every query head still reads
   the values it read before, and L divides H because G and G' do.
2. pool each run of L / G' heads into one. Nothing is lost where the run repeats one head, so G' a multiple of G is exact.

Only K and V projections change, weights [G·D, d] and biases [G·D] alike, and they are computed when they are read; with GLU
attention values and gates, each on its own. Every other tensor is the object that came in. QK-norm weights have D entries that
all heads share, so they stay as they are: K is pooled before its norm, which then gives the pooled head the scale that the
trained heads had.

`mean` averages the heads of a group, `mean-renorm` gives the average the root mean square of their norms (of m orthogonal
heads √m times its own), `first` keeps the first one, `random` keeps one that the seed and the layer number choose, the same
for K and V.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch

from exporter.config import ModelConfig
from exporter.errors import CheckpointError
from exporter.weights import ComputedTensor, LazyTensor, Weights

Pooling = Literal["mean", "first", "random", "mean-renorm"]
POOLING: tuple[Pooling, ...] = get_args(Pooling)


def pooled_tensors(
    config: ModelConfig, weights: Weights, target: ModelConfig, method: Pooling, seed: int
) -> dict[str, LazyTensor]:
    """The K and V projections that differ between `config` and `target`, which have the same layers.

    Raises CheckpointError where a projection is missing or has another shape than the config says.
    """
    pooled: dict[str, LazyTensor] = {}
    for layer, (before, after) in enumerate(zip(config.kv_heads, target.kv_heads, strict=True)):
        if before == after:
            continue
        source = _source_heads(before, after, method, np.random.default_rng([seed, layer]))
        for name, tensor, matrix, size in _projections(config, weights, layer):
            shape = (after * size, *tensor.shape[1:])
            measured = matrix if method == "mean-renorm" else None
            compute = partial(_pool, tensor, source, size, measured)
            pooled[name] = ComputedTensor(name, tensor.dtype, shape, compute)
    return pooled


def _source_heads(before: int, after: int, method: Pooling, rng: np.random.Generator) -> np.ndarray:
    """Which old heads are averaged into each new one: int [after, n], an index repeated where a head weighs more."""
    common = math.lcm(before, after)
    groups = np.repeat(np.arange(before), common // before).reshape(after, -1)
    if method == "first":
        return groups[:, :1]
    if method == "random":
        return np.take_along_axis(groups, rng.integers(groups.shape[1], size=(after, 1)), axis=1)
    return groups


def _projections(config: ModelConfig, weights: Weights, layer: int) -> list[tuple[str, LazyTensor, LazyTensor, int]]:
    """K and V weights of one layer by name, and their biases where there are any, each with the weight it belongs to and its
    channels a head; their rows checked against the config."""
    prefix = f"model.layers.{layer}.self_attn."
    sizes = {"k_proj": config.head_dim, "v_proj": config.value_dim}
    sizes |= {"v_gate_proj": config.value_dim} if config.glu_value_dim is not None else {}
    if missing := [f"{prefix}{name}.weight" for name in sizes if f"{prefix}{name}.weight" not in weights]:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}")
    found = []
    for name, size in sizes.items():
        matrix = weights[f"{prefix}{name}.weight"]
        names = [f"{prefix}{name}.{kind}" for kind in ("weight", "bias")]
        found += [(each, weights[each], matrix, size) for each in names if each in weights]
    for name, tensor, _, size in found:
        if tensor.shape[0] != config.kv_heads[layer] * size:
            raise CheckpointError(
                f"{name} has {tensor.shape[0]} rows, its config says {config.kv_heads[layer] * size}: "
                f"{config.kv_heads[layer]} KV heads of {size}"
            )
    return found


def _pool(tensor: LazyTensor, source: np.ndarray, head_dim: int, measured: LazyTensor | None) -> torch.Tensor:
    """The mean of the named heads, rescaled where `measured` is the matrix whose norms it shall keep."""
    mean = _mean(tensor, source, head_dim)
    if measured is None:
        return mean.to(tensor.dtype).flatten(0, 1)
    heads = measured.read().double().reshape(-1, head_dim * measured.shape[1])
    wanted = heads.square().sum(1)[torch.from_numpy(source)].mean(1).sqrt()
    pooled = _mean(measured, source, head_dim).double().flatten(1).norm(dim=1)
    gain = torch.where(pooled > 0, wanted / pooled.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return (mean.double() * gain.reshape(-1, *[1] * (mean.dim() - 1))).to(tensor.dtype).flatten(0, 1)


def _mean(tensor: LazyTensor, source: np.ndarray, head_dim: int) -> torch.Tensor:
    """[G', D, …], summed in float64: equal heads give themselves back to the bit."""
    heads = tensor.read().reshape(-1, head_dim, *tensor.shape[1:])
    index = torch.from_numpy(source)
    if source.shape[1] == 1 or bool((source == source[:, :1]).all()):
        return heads[index[:, 0]]
    total = heads[index[:, 0]].double()
    for column in index.T[1:]:
        total += heads[column]
    return total / source.shape[1]
