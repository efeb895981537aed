"""Which KV heads share: the partition into equal groups that loses least, in the metric that sharing minimises.

A group loses what a truncated SVD of its heads leaves out (exporter/convert/sharing.py), as a share of what all heads hold:
keys and values count alike. Under QK-norm keys are averaged, and lose what their mean leaves out; so do the values and gates of
GLU attention.

The search works on the losses of pairs, by swaps from several starts; of what it finds, and the contiguous groups, the
partition with the least loss of whole groups is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from exporter.convert.attention import AttentionWeights
from exporter.convert.fold import blocks_of, output_weights, query_weights
from exporter.convert.sharing import gram, square_root

STARTS = 8
Measured = tuple[Tensor, Callable[[Tensor], float]]


def best_order(layer: AttentionWeights, kv_heads: int, rotary_dim: int, moments: Tensor, seed: int) -> list[int]:
    """The L KV heads of `layer` in an order whose runs of L / kv_heads are the groups. `seed` draws the starts."""
    L = layer.kv_heads
    if kv_heads in (1, L):
        return list(range(L))
    grams = _grams(layer, rotary_dim, moments)
    pairs = np.zeros((L, L))
    for one, other in itertools.combinations(range(L), 2):
        pairs[one, other] = pairs[other, one] = _loss(grams, [one, other])
    generator = np.random.default_rng(seed)
    starts = [np.arange(L), *(generator.permutation(L) for _ in range(STARTS))]
    found = [_improve(start.reshape(kv_heads, -1), pairs) for start in starts]
    candidates = [np.arange(L).reshape(kv_heads, -1), *found]
    losses = [sum(_loss(grams, group.tolist()) for group in groups) for groups in candidates]
    groups = candidates[int(np.argmin(losses))]  # the first of equals: contiguous where nothing is better
    return [int(head) for group in sorted(map(sorted, groups.tolist())) for head in group]


def _grams(layer: AttentionWeights, rotary_dim: int, moments: Tensor) -> list[Measured]:
    """Weighted inner products of all heads, [blocks, L, r, L, r] each, scaled so that keys and values hold 1 each, and what
    sharing loses by them."""
    output = layer.output.permute(1, 0, 2).unflatten(0, (layer.kv_heads, -1))
    if layer.gate is None:
        value_gram, lost = _gram(layer.value[None], output_weights(output)[None], moments), _truncated
    else:
        halves = torch.cat([layer.value, layer.gate], 1)
        same = torch.eye(halves.shape[1], dtype=halves.dtype)
        value_gram, lost = _gram(halves[None], same.expand(1, layer.kv_heads, -1, -1), moments), _averaged
    values = [(_share(value_gram, _trace(value_gram)), lost)]
    if layer.norms is not None:
        same = torch.eye(layer.key.shape[1], dtype=layer.key.dtype)
        key_gram = _gram(layer.key[None], same.expand(1, layer.kv_heads, -1, -1), moments)
        return [(_share(key_gram, _trace(key_gram)), _averaged), *values]
    asking = moments if layer.asking is None else layer.asking
    key_grams = []
    for block in blocks_of(layer.key.shape[1], rotary_dim):
        asked = block.of(layer.query).unflatten(1, (layer.kv_heads, -1))
        key_grams.append(_gram(block.of(layer.key), query_weights(asked, asking), moments))
    held = sum(_trace(gram) for gram in key_grams)
    return [*((_share(gram, held), _truncated) for gram in key_grams), *values]


def _share(gram: Tensor, held: float) -> Tensor:
    return gram / held if held > 0 else gram  # heads that hold nothing lose nothing


def _gram(heads: Tensor, weights: Tensor, moments: Tensor) -> Tensor:
    rows = square_root(weights)[0] @ heads
    L, r = rows.shape[-3:-1]
    return gram(rows.flatten(-3, -2), moments).unflatten(-1, (L, r)).unflatten(-3, (L, r))


def _trace(gram: Tensor) -> float:
    return float(torch.einsum("blrlr->", gram).real)


def _loss(grams: list[Measured], group: list[int]) -> float:
    """What one shared head leaves out of the heads in `group`."""
    return sum(lost(products[:, group][:, :, :, group]) for products, lost in grams)


def _truncated(inside: Tensor) -> float:
    """All but the r largest eigenvalues of [blocks, m, r, m, r]."""
    r = inside.shape[2]
    return float(torch.linalg.eigvalsh(inside.flatten(3, 4).flatten(1, 2))[:, :-r].clamp_min(0).sum())


def _averaged(inside: Tensor) -> float:
    """The sum of squared distances of m heads from their mean."""
    return _trace(inside) - float(torch.einsum("blrmr->", inside).real) / inside.shape[1]


def _improve(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Swaps heads of two groups [G,m] as long as that lowers the sum of `pairs` [L,L] inside groups."""
    groups = groups.copy()
    member = np.zeros((len(groups), len(pairs)))
    for index, group in enumerate(groups):
        member[index, group] = 1
    while True:
        near = member @ pairs  # [G,L]: how far each head is from each group
        place = member.argmax(0)
        own = near[place, np.arange(len(pairs))]
        # heads i and j change places: each leaves its own group for the other's, where the other no longer is
        change = near[place].T + near[place] - own[:, None] - own[None, :] - 2 * pairs
        change[place[:, None] == place[None, :]] = 0
        one, other = np.unravel_index(change.argmin(), change.shape)
        if not change[one, other] < -1e-12:
            return np.stack([np.flatnonzero(row) for row in member])
        member[place[one], one] = member[place[other], other] = 0
        member[place[other], one] = member[place[one], other] = 1
