"""One layer corrected on what it reads: least squares on calibration activations, all of it linear in one weight at a time.

1. W_Q, then W_K: attention scores as the original's. A score's error counts with the original attention probability of its
   place, and after the mean error of its row is taken off, which a softmax does not see. That is the second-order expansion of
   KL(original ‖ converted) of the attention probabilities.
2. W_O, then W_V: the attention's output as wanted, given the probabilities that 1 leads to.

W_O is solved directly, with a ridge. The others have too many unknowns for that: conjugate gradients, started where they are,
preconditioned with the second moments of the inputs, and stopped after few steps, which keeps what the tokens say little about.

Of a large model every weight here is hundreds of megabytes: they change in their place, and what can be summed is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.convert.attention import AttentionWeights
from exporter.convert.causal import CausalAttention
from exporter.convert.least_squares import Tokens, conjugate_gradients

RIDGE = 0.02  # of the mean second moment
FLOOR = torch.finfo(torch.float32).tiny  # of a ridge; its inverse is a float32 too
ROUNDS = 2  # W_Q and W_K in turns
SCORE_STEPS = 5
VALUE_ROUNDS = 1  # W_O and W_V in turns
VALUE_STEPS = 3
COLUMNS = 512  # of a matrix that are worked on in float64 at a time

OfWindow = Callable[[int, Tensor], Tensor]  # of a window by its number


@dataclass(frozen=True)
class Examples:
    """What a layer is fitted on, n windows: what it reads, and the original attention's scores, probabilities and output.

    `wanted` [n,T,d] is what the converted layer's attention shall give. Heads are in the order of the converted layer's.
    """

    tokens: Tokens
    scored: list[tuple[Tensor, Tensor]]  # the original's rotated queries [H,T,D] and keys [L,T,D]
    probabilities: list[Tensor]  # [H,T,T] each
    wanted: Tensor

    @property
    def inputs(self) -> Tensor:
        """[n,T,e]"""
        return self.tokens.inputs


def refine_scores(attention: CausalAttention, folded: AttentionWeights, examples: Examples, rounds: int) -> None:
    """Correct W_Q and W_K of `folded` `rounds` times; not under QK-norm, where scores are not linear in them.

    The probabilities of `examples` become the converted layer's.
    """
    for _ in range(rounds if folded.norms is None else 0):
        _fit_queries(attention, folded, examples)
        _fit_keys(attention, folded, examples)
    for window, inputs in enumerate(examples.inputs):
        examples.probabilities[window] = attention.attention(folded, inputs)


def refine_output(attention: CausalAttention, folded: AttentionWeights, examples: Examples) -> None:
    """Correct W_O and W_V of `folded`, given the probabilities of `examples`."""
    _solve_output(attention, folded, examples)
    for _ in range(VALUE_ROUNDS):
        _fit_values(attention, folded, examples)
        _solve_output(attention, folded, examples)


def second_moments(inputs: Tensor) -> Tensor:
    """Inputs [n,T,e] → float64 [e,e], the mean over tokens."""
    total = inputs.new_zeros(inputs.shape[2], inputs.shape[2], dtype=torch.float64)
    for window in inputs:
        _add_gram(total, window)
    return total / inputs[..., 0].numel()


def ridge_inverse(moments: Tensor) -> Tensor:
    """Of [e,e] moments; they are changed. What no token reads leaves the ridge alone, which is floored for that."""
    _add_ridge(moments)
    return torch.cholesky_inverse(torch.linalg.cholesky(moments), out=moments)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """rowsᵀ · rows of [T,e], added to float64 [e,e]."""
    for part, columns in zip(total.split(COLUMNS), rows.split(COLUMNS, dim=1), strict=True):
        part += columns.T @ rows


def _add_ridge(moments: Tensor) -> None:
    moments.diagonal().add_((RIDGE * moments.diagonal().mean()).clamp_min(FLOOR))


def _fit_queries(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> None:
    keys = [attention.project(layer.key, inputs) for inputs in examples.inputs]

    def scores(window: int, queries: Tensor) -> Tensor:
        return attention.scores(queries, keys[window])

    def adjoint(window: int, scores: Tensor) -> Tensor:
        return attention.scores_adjoint_query(scores, keys[window])

    _fit_scores(attention, layer.query, scores, adjoint, examples)


def _fit_keys(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> None:
    queries = [attention.project(layer.query, inputs) for inputs in examples.inputs]

    def scores(window: int, keys: Tensor) -> Tensor:
        return attention.scores(queries[window], keys)

    def adjoint(window: int, scores: Tensor) -> Tensor:
        return attention.scores_adjoint_key(scores, queries[window], layer.kv_heads)

    _fit_scores(attention, layer.key, scores, adjoint, examples)


def _fit_scores(attention: CausalAttention, weights: Tensor, scores: OfWindow, adjoint: OfWindow, examples: Examples) -> None:
    """`weights` [heads,D,e], of whose rotated projections [heads,T,D] `scores` makes scores."""

    def back(window: int, errors: Tensor) -> Tensor:
        return attention.turned_back(adjoint(window, _weighted(examples.probabilities[window], errors)))

    def normal(window: int, read: Tensor) -> Tensor:
        return back(window, scores(window, attention.turned(read)))

    wanted = (back(window, attention.scores(*pair)) for window, pair in enumerate(examples.scored))
    conjugate_gradients(normal, wanted, weights, examples.tokens, SCORE_STEPS, apart=True)


def _weighted(probabilities: Tensor, scores: Tensor) -> Tensor:
    """Scores less their mean under the probabilities, times those; in their place."""
    scores *= probabilities
    return scores.addcmul_(probabilities, scores.sum(-1, keepdim=True), value=-1)


def _fit_values(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> None:
    output = layer.output.flatten(1)
    gram = output.T @ output

    def adjoint(window: int, mixed: Tensor) -> Tensor:
        """[T,H·Dv] → [T,G,Dv]."""
        heads = mixed.unflatten(1, layer.output.shape[1:]).transpose(0, 1)
        values = attention.mix_adjoint(examples.probabilities[window], heads, layer.kv_heads)
        return attention.gated(layer, values, examples.inputs[window]).transpose(0, 1)

    def normal(window: int, read: Tensor) -> Tensor:
        values = attention.gated(layer, read.transpose(0, 1), examples.inputs[window])
        mixed = attention.mix(examples.probabilities[window], values).transpose(0, 1).flatten(1)
        return adjoint(window, mixed @ gram)

    wanted = (adjoint(window, given @ output) for window, given in enumerate(examples.wanted))
    conjugate_gradients(normal, wanted, layer.value, examples.tokens, VALUE_STEPS, apart=False)


def _solve_output(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> None:
    """W_O [d,H,Dv] by least squares, the ridge drawing towards the W_O there is: where that fits, it stays."""
    output = layer.output.flatten(1)
    moments = output.new_zeros(output.shape[1], output.shape[1], dtype=torch.float64)
    errors = torch.zeros_like(output)
    for inputs, probabilities, wanted in zip(examples.inputs, examples.probabilities, examples.wanted, strict=True):
        mixed = attention.mixed(layer, probabilities, inputs)
        _add_gram(moments, mixed)
        errors.addmm_((wanted - mixed @ output.T).T, mixed)
    _add_ridge(moments)
    moments = torch.linalg.cholesky(moments)
    for rows, error in zip(layer.output.split(COLUMNS), errors.split(COLUMNS), strict=True):
        rows += torch.cholesky_solve(error.double().T, moments).T.unflatten(1, rows.shape[1:])
