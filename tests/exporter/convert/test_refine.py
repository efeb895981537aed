"""Least squares on what a layer reads: gradients of the loss, written down here, vanish where it ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_heads import ROTARY, WIDTH, D, T, config, layer, normal

from exporter.convert import refine
from exporter.convert.attention import AttentionWeights
from exporter.convert.causal import CausalAttention
from exporter.convert.least_squares import Tokens, conjugate_gradients
from exporter.convert.refine import Examples, refine_output, refine_scores, ridge_inverse, second_moments

HEADS, KV_HEADS, WINDOWS = 4, 2, 3


@ROTARY
def test_adjoints(rotary_dim: int) -> None:
    attention = CausalAttention(config(rotary_dim, 6, 2), T)
    inputs, query, key = normal(T, WIDTH), normal(6, D, WIDTH, seed=1), normal(2, D, WIDTH, seed=2)
    scores, mixed = normal(6, T, T, seed=3), normal(6, T, D, seed=4)

    def same(one: torch.Tensor, two: torch.Tensor, three: torch.Tensor, four: torch.Tensor) -> None:
        assert float((one * two).sum()) == pytest.approx(float((three * four).sum()), rel=1e-9)

    q, k = attention.project(query, inputs), attention.project(key, inputs)
    same(attention.scores(q, k), scores, q, attention.scores_adjoint_query(scores, k))
    same(attention.scores(q, k), scores, k, attention.scores_adjoint_key(scores, q, 2))
    same(attention.mix(scores, k), mixed, k, attention.mix_adjoint(scores, mixed, 2))
    read = normal(T, 6, D, seed=5)
    same(attention.turned(read), mixed, read, attention.turned_back(mixed))
    torch.testing.assert_close(attention.turned((inputs @ query.flatten(0, 1).T).view(T, 6, D)), q)


def rotated(heads: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """[heads,T,D] by complex numbers."""
    if not rotary_dim:
        return heads
    half = rotary_dim // 2
    angles = torch.outer(torch.arange(T).double(), 50.0 ** (-torch.arange(half).double() / half))
    turned = torch.complex(heads[..., :half], heads[..., half:rotary_dim]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, heads[..., rotary_dim:]], -1)


def scores(query: torch.Tensor, key: torch.Tensor, inputs: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    queries, keys = (rotated(torch.einsum("hde,te->htd", heads, inputs), rotary_dim) for heads in (query, key))
    return torch.einsum("htd,hsd->hts", queries, keys.repeat_interleave(len(query) // len(key), 0)) / D**0.5


def examples(attention: CausalAttention) -> tuple[Examples, AttentionWeights]:
    """Of another layer, and the layer to be fitted to it."""
    inputs, other = normal(WINDOWS, T, WIDTH), layer(HEADS, HEADS)
    scored = [attention.scored(other, window) for window in inputs]
    probabilities = [attention.probabilities(attention.scores(*pair)) for pair in scored]
    tokens = Tokens(inputs, ridge_inverse(second_moments(inputs)))
    start = AttentionWeights(
        *(normal(n, D, WIDTH, seed=5 + n) * 0.5 for n in (HEADS, KV_HEADS, KV_HEADS)), other.output.clone()
    )
    return Examples(tokens, scored, probabilities, attention.outputs(other, probabilities, inputs)), start


@pytest.mark.parametrize("what", ["query", "key"])
@pytest.mark.parametrize("rotary_dim", [D, 0])
def test_scores_fit_where_attention_looks(what: str, rotary_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ p (e − Σ p e)² of the scores' errors e is least, p being the original's probabilities."""
    attention = CausalAttention(config(rotary_dim, HEADS, KV_HEADS), T)
    given, folded = examples(attention)
    probabilities = [window.clone() for window in given.probabilities]
    wanted = [attention.scores(*pair) for pair in given.scored]

    def gradient() -> torch.Tensor:
        query, key = folded.query.clone().requires_grad_(), folded.key.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for inputs, p, original in zip(given.inputs, probabilities, wanted, strict=True):
            error = scores(query, key, inputs, rotary_dim) - original
            loss = loss + (p * (error - (p * error).sum(-1, keepdim=True)) ** 2).sum()
        return torch.autograd.grad(loss, query if what == "query" else key)[0]

    monkeypatch.setattr(refine, "SCORE_STEPS", 400)
    if what == "query":
        monkeypatch.setattr(refine, "_fit_keys", lambda *_: None)
    before = gradient().norm()
    refine_scores(attention, folded, given, rounds=1)
    assert gradient().norm() < 1e-4 * before  # float32 angles; a hundredth part of the loss wrong would leave 1e-2


def test_both_sides_of_scores_are_fitted() -> None:
    attention = CausalAttention(config(D, HEADS, KV_HEADS), T)
    given, folded = examples(attention)
    before = folded.query.clone(), folded.key.clone()
    refine_scores(attention, folded, given, rounds=1)
    moved = [float((after - was).norm() / was.norm()) for after, was in zip((folded.query, folded.key), before, strict=True)]
    assert min(moved) > 0.05  # far above rounding, which is all that a side left out would move by


@pytest.mark.parametrize(("gated", "left"), [(False, 1e-6), (True, 3e-3)])  # gates near 0 say little of their values
def test_values_fit_the_output(gated: bool, left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = CausalAttention(config(D, HEADS, KV_HEADS), T)
    given, folded = examples(attention)
    if gated:
        folded = dataclasses.replace(folded, gate=normal(KV_HEADS, D, WIDTH, seed=11))

    def gradient() -> torch.Tensor:
        value = folded.value.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for inputs, p, wanted in zip(given.inputs, given.probabilities, given.wanted, strict=True):
            values = torch.einsum("gde,te->gtd", value, inputs)
            if folded.gate is not None:
                gates = torch.einsum("gde,te->gtd", folded.gate, inputs)
                values = values * gates / (1 + torch.exp(-gates))
            heads = p @ values.repeat_interleave(HEADS // KV_HEADS, 0)
            loss = loss + ((torch.einsum("ohd,htd->to", folded.output, heads) - wanted) ** 2).sum()
        return torch.autograd.grad(loss, value)[0]

    monkeypatch.setattr(refine, "VALUE_STEPS", 2000)
    monkeypatch.setattr(refine, "_solve_output", lambda *_: None)
    before = gradient().norm()
    refine_output(attention, folded, given)
    assert gradient().norm() < left * before


def test_heads_apart_know_nothing_of_each_other() -> None:
    """Few steps of three problems at once are those of each alone; as one problem they are not."""
    inputs, made = normal(2, T, 12), normal(2, 3, T, T, seed=1)
    normals = made @ made.mT * torch.tensor([1.0, 30.0, 0.1]).double()[None, :, None, None]
    tokens, truth = Tokens(inputs, ridge_inverse(second_moments(inputs))), normal(3, 2, 12, seed=2)

    def fitted(heads: slice, apart: bool) -> torch.Tensor:
        def operator(window: int, read: torch.Tensor) -> torch.Tensor:
            return torch.einsum("hts,shr->thr", normals[window, heads], read)

        found = torch.zeros_like(truth[heads])
        wanted = [operator(window, read) for window, read in enumerate(tokens.read(truth[heads]))]
        conjugate_gradients(operator, wanted, found, tokens, 3, apart)
        return found

    alone = torch.cat([fitted(slice(head, head + 1), apart=True) for head in range(3)])
    torch.testing.assert_close(fitted(slice(None), apart=True), alone)
    assert (fitted(slice(None), apart=False) - alone).norm() > 0.01 * alone.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("kind", ["plain", "same", "zero", "rank one"])
@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 5, 12), (2, 10, 8), (4, 12, 6)])
def test_steps_after_the_end_do_no_harm(shape: tuple[int, int, int], kind: str, apart: bool, dtype: torch.dtype) -> None:
    """Of problems that no weights solve, too: what is left is noise, in which there is no direction."""
    windows, length, width = shape
    inputs = normal(*shape) * (kind != "zero")
    if kind == "same":
        inputs[:] = inputs[0, 0].clone()
    maps = normal(windows, 3, length, 1 if kind == "rank one" else length, seed=1)
    normals = (maps @ maps.mT).to(dtype)
    wanted = normal(windows, length, 3, 2, seed=2).to(dtype)

    def operator(window: int, read: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hts,shr->thr", normals[window], read)

    def loss(weights: torch.Tensor) -> float:
        errors = np.einsum("nte,hre->nthr", inputs.numpy(), weights.double().numpy()) - wanted.double().numpy()
        return float(np.einsum("nthr,nhts,nshr->", errors, normals.double().numpy(), errors))

    tokens = Tokens(inputs.to(dtype), ridge_inverse(second_moments(inputs)).to(dtype))
    start = normal(3, 2, width, seed=3).to(dtype)
    found = start.clone()
    conjugate_gradients(operator, [operator(window, read) for window, read in enumerate(wanted)], found, tokens, 40, apart)
    assert loss(found) <= loss(start) * (1 + 1e-5) + 1e-9  # float32's rounding of weights of some ones


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("windows", [1, 4])  # fewer tokens than two times their width, and more
def test_conjugate_gradients_solve(apart: bool, windows: int) -> None:
    heads, r, length = 3, 2, 10
    inputs, made = normal(windows, length, 12), normal(windows, heads, length * r, length * r, seed=1)
    normals = made @ made.mT + 10 * torch.eye(length * r)
    tokens = Tokens(inputs, ridge_inverse(second_moments(inputs)))

    def operator(window: int, read: torch.Tensor) -> torch.Tensor:
        one = read.transpose(0, 1).flatten(1)[..., None]
        return (normals[window] @ one).view(heads, length, r).transpose(0, 1)

    truth = normal(heads, r, 12, seed=2)
    wanted = [operator(window, read) for window, read in enumerate(tokens.read(truth))]
    found = torch.zeros_like(truth)
    conjugate_gradients(operator, wanted, found, tokens, 60, apart)
    torch.testing.assert_close(tokens.read(found), tokens.read(truth), rtol=1e-6, atol=1e-6)
    if windows > 1:  # they say all of the weights
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)


def test_both_forms_of_the_kernel() -> None:
    inputs, dual = normal(3, 8, 12), normal(3, 8, 2, 4, seed=1)
    few, many = (Tokens(inputs, ridge_inverse(second_moments(inputs))) for _ in range(2))
    assert few.kernel is None  # 24 tokens of 12
    few.kernel = few.rows @ few.inverse @ few.rows.T
    torch.testing.assert_close(few.read_solved(dual), many.read_solved(dual))
    torch.testing.assert_close(few.read(few.weights(dual)), many.read_solved(dual))
