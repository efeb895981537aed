"""Sharing, folding and partitions against what was planted, numpy's SVD, and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from small_heads import ROTARY, WIDTH, D, T, config, layer, normal

from exporter.convert.attention import AttentionWeights
from exporter.convert.causal import CausalAttention
from exporter.convert.fold import fold
from exporter.convert.partition import best_order
from exporter.convert.sharing import Sharing, aligned, leading

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # of float64, through decompositions
BOTH = pytest.mark.parametrize("sharing", [aligned, leading])


def moments(seed: int = 9) -> torch.Tensor:
    """Of inputs far from white."""
    inputs = normal(3 * WIDTH, WIDTH, seed=seed) * torch.logspace(0, -1, WIDTH, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs)


def turned(rotary_dim: int, count: int, seed: int) -> torch.Tensor:
    """Orthogonal [count, D, D] that commute with rotations of the first `rotary_dim` channels in half-split pairs."""
    found = torch.zeros(count, D, D, dtype=torch.float64)
    half = rotary_dim // 2
    angles = normal(count, half, seed=seed) * 3
    pairs = torch.arange(half)
    found[:, pairs, pairs] = found[:, pairs + half, pairs + half] = angles.cos()
    found[:, pairs, pairs + half], found[:, pairs + half, pairs] = -angles.sin(), angles.sin()
    if rotary_dim < D:
        found[:, rotary_dim:, rotary_dim:] = torch.linalg.qr(normal(count, D - rotary_dim, D - rotary_dim, seed=seed + 1))[0]
    return found


def planted(rotary_dim: int, heads: int, kv_heads: int, groups: int) -> AttentionWeights:
    """The heads of a group are one head, turned."""
    made, m = layer(heads, kv_heads), kv_heads // groups
    key = turned(rotary_dim, kv_heads, 5) @ made.key[:groups].repeat_interleave(m, 0)
    value = turned(0, kv_heads, 7) @ made.value[:groups].repeat_interleave(m, 0)
    return AttentionWeights(made.query, key, value, made.output)


def attend(made: AttentionWeights, rotary_dim: int) -> torch.Tensor:
    shape = config(rotary_dim, made.query.shape[0], made.kv_heads)
    inputs = normal(T, WIDTH, seed=8) * 0.3
    return CausalAttention(shape, T).attend(made.to(torch.float64), inputs[None])[0]


@BOTH
@ROTARY
def test_planted_rotations_are_recovered(sharing: Sharing, rotary_dim: int) -> None:
    before = planted(rotary_dim, 12, 6, 2)
    after = fold(before, 2, rotary_dim, sharing, moments())
    assert after.key.shape == after.value.shape == (2, D, WIDTH)
    torch.testing.assert_close(attend(after, rotary_dim), attend(before, rotary_dim), **ROUNDING)
    mean = AttentionWeights(before.query, *(w.unflatten(0, (2, 3)).mean(1) for w in (before.key, before.value)), before.output)
    assert (attend(mean, rotary_dim) - attend(before, rotary_dim)).abs().max() > 1  # turned heads are not equal heads


@BOTH
@ROTARY
@pytest.mark.parametrize("groups", [6, 3])
def test_as_many_heads_and_identical_heads_lose_nothing(sharing: Sharing, rotary_dim: int, groups: int) -> None:
    before = layer(12, groups).degrouped(6)
    after = fold(before, groups, rotary_dim, sharing, moments())
    torch.testing.assert_close(attend(after, rotary_dim), attend(before, rotary_dim), **ROUNDING)


def test_a_turn_that_does_not_commute_with_rope_is_not_folded() -> None:
    before = planted(0, 6, 3, 1)
    after = fold(before, 1, D, leading, moments())
    assert (attend(after, D) - attend(before, D)).abs().max() > 0.1


def test_leading_loses_what_the_singular_values_left_out_hold() -> None:
    heads, metric = normal(3, D, WIDTH), moments()
    outputs = normal(3, WIDTH, D, seed=4)
    shared, basis = leading(heads, outputs.mT @ outputs, metric)
    root = np.linalg.cholesky(metric.numpy())
    stacked = np.concatenate([(o @ h).numpy() @ root for o, h in zip(outputs, heads, strict=True)])
    rebuilt = np.concatenate([(o @ b @ shared).numpy() @ root for o, b in zip(outputs, basis, strict=True)])
    left_out = np.linalg.svd(stacked, compute_uv=False)[D:]
    assert np.linalg.norm(stacked - rebuilt) ** 2 == pytest.approx((left_out**2).sum(), rel=1e-6)


def test_leading_weighs_frequencies_by_what_queries_ask() -> None:
    """Of two keys, the one that is not asked about is given up."""
    before = layer(2, 2)
    query = before.query.clone()
    query[1] *= 1e-6
    after = fold(AttentionWeights(query, before.key, before.value, before.output), 1, D, leading, moments())
    asked = after.query[0].T @ after.key[0]
    torch.testing.assert_close(asked, query[0].T @ before.key[0], **ROUNDING)


def test_heads_in_order_attend_as_before() -> None:
    before = layer(12, 4)
    after = before.ordered([2, 0, 3, 1])
    assert not torch.equal(after.key, before.key)
    torch.testing.assert_close(attend(after, D), attend(before, D))


@ROTARY
def test_the_partition_finds_heads_that_are_one(rotary_dim: int) -> None:
    shuffled = planted(rotary_dim, 12, 6, 3).ordered([0, 2, 4, 1, 5, 3])
    order = best_order(shuffled, 3, rotary_dim, moments(), seed=0)
    assert [{order[2 * g], order[2 * g + 1]} for g in range(3)] == [{0, 3}, {1, 5}, {2, 4}]
    after = fold(shuffled.ordered(order), 3, rotary_dim, leading, moments())
    torch.testing.assert_close(attend(after, rotary_dim), attend(shuffled, rotary_dim), **ROUNDING)


def test_the_partition_in_pairs_is_the_best_of_all() -> None:
    made, metric = layer(8, 8), moments()

    def lost(order: list[int]) -> float:
        """What sharing in pairs leaves out, by numpy: keys a frequency, values whole, each as a share of all there is."""
        root = np.linalg.cholesky(metric.numpy())
        keys, queries = (w.numpy() for w in (made.key, made.query))
        keys, queries = (w[:, : D // 2] + 1j * w[:, D // 2 :] for w in (keys, queries))
        energy = np.linalg.norm(queries @ root, axis=2)
        rows = energy[:, :, None] * (keys @ root)
        values = np.stack([(made.output[:, h] @ made.value[h]).numpy() @ root for h in range(8)])
        out = 0.0
        for one, other in zip(order[::2], order[1::2], strict=True):
            singular = np.linalg.svd(rows[[one, other]].transpose(1, 0, 2), compute_uv=False)
            out += (singular[:, 1:] ** 2).sum() / (np.abs(rows) ** 2).sum()
            singular = np.linalg.svd(np.concatenate([values[one], values[other]]), compute_uv=False)
            out += (singular[D:] ** 2).sum() / (values**2).sum()
        return out

    every = (
        o for o in itertools.permutations(range(8)) if all(o[i] < o[i + 1] for i in (0, 2, 4, 6)) and o[0] < o[2] < o[4] < o[6]
    )
    best = min(lost(list(order)) for order in every)
    assert lost(best_order(made, 4, D, metric, seed=0)) == pytest.approx(best, rel=1e-9)
    assert best < 0.999 * lost(list(range(8)))
