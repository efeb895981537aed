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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.convert.attention import AttentionWeights
from exporter.convert.causal import CausalAttention

RIDGE = 0.02  # of the mean second moment
FLOOR = torch.finfo(torch.float32).tiny  # of a ridge; its inverse is a float32 too
ROUNDS = 2  # W_Q and W_K in turns
SCORE_STEPS = 5
VALUE_ROUNDS = 1  # W_O and W_V in turns
VALUE_STEPS = 3
COLUMNS = 512  # of a matrix that are worked on in float64 at a time


@dataclass(frozen=True)
class Examples:
    """What a layer is fitted on, n windows: what it reads, and the original attention's probabilities and output.

    `wanted` [n,T,d] is what the converted layer's attention shall give. `inverse` is `ridge_inverse` of the moments of `inputs`
    [n,T,e], in their dtype.
    """

    inputs: Tensor
    probabilities: list[Tensor]  # [H,T,T] each
    wanted: Tensor
    inverse: Tensor


Original = tuple[Tensor, Tensor]  # W_Q and W_K, their heads in the order of the converted layer's
Operator = Callable[[Tensor], Tensor]
OfWindow = Callable[[int, Tensor], Tensor]  # of a window by its number
AddOfWindow = Callable[[Tensor, int, Tensor], None]  # what to add it to, the window's number


def refine_scores(
    attention: CausalAttention, original: Original, folded: AttentionWeights, read: Tensor, examples: Examples, rounds: int
) -> None:
    """Correct W_Q and W_K of `folded` `rounds` times; not under QK-norm, where scores are not linear in them.

    `original` reads `read` [n,T,e]. The probabilities of `examples` become the converted layer's.
    """
    for _ in range(rounds if folded.norms is None else 0):
        _fit_queries(attention, original, folded, read, examples)
        _fit_keys(attention, original, folded, read, examples)
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


def _fit_queries(
    attention: CausalAttention, original: Original, layer: AttentionWeights, read: Tensor, examples: Examples
) -> None:
    keys = [attention.project(layer.key, inputs) for inputs in examples.inputs]

    def scores(window: int, query: Tensor) -> Tensor:
        found = attention.scores(attention.project(query, examples.inputs[window]), keys[window])
        return _weighted(examples.probabilities[window], found)

    def adjoint(total: Tensor, window: int, errors: Tensor) -> None:
        back = attention.scores_adjoint_query(errors, keys[window])
        attention.project_adjoint(back, examples.inputs[window], total)

    wanted = _wanted_scores(attention, original, read, examples)
    _fit(layer.query, scores, adjoint, wanted, examples, SCORE_STEPS, apart=True)


def _fit_keys(
    attention: CausalAttention, original: Original, layer: AttentionWeights, read: Tensor, examples: Examples
) -> None:
    queries = [attention.project(layer.query, inputs) for inputs in examples.inputs]

    def scores(window: int, key: Tensor) -> Tensor:
        found = attention.scores(queries[window], attention.project(key, examples.inputs[window]))
        return _weighted(examples.probabilities[window], found)

    def adjoint(total: Tensor, window: int, errors: Tensor) -> None:
        back = attention.scores_adjoint_key(errors, queries[window], layer.kv_heads)
        attention.project_adjoint(back, examples.inputs[window], total)

    wanted = _wanted_scores(attention, original, read, examples)
    _fit(layer.key, scores, adjoint, wanted, examples, SCORE_STEPS, apart=True)


def _wanted_scores(attention: CausalAttention, original: Original, read: Tensor, examples: Examples) -> Iterator[Tensor]:
    for inputs, probabilities in zip(read, examples.probabilities, strict=True):
        query, key = (attention.project(heads, inputs) for heads in original)
        yield _weighted(probabilities, attention.scores(query, key))


def _weighted(probabilities: Tensor, scores: Tensor) -> Tensor:
    """Scores less their mean under the probabilities, times those."""
    weighted = probabilities * scores
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


def _fit_values(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> None:
    output = layer.output.flatten(1)

    def given(window: int, value: Tensor) -> Tensor:
        mixed = attention.mixed(replace(layer, value=value), examples.probabilities[window], examples.inputs[window])
        return mixed @ output.T

    def adjoint(total: Tensor, window: int, errors: Tensor) -> None:
        """Errors of the output, [T,d], to [G,Dv,e]."""
        heads = (errors @ output).unflatten(1, layer.output.shape[1:]).transpose(0, 1)
        inputs = examples.inputs[window]
        values = attention.mix_adjoint(examples.probabilities[window], heads, layer.kv_heads)
        total.view(-1, total.shape[2]).addmm_(attention.gated(layer, values, inputs).mT.flatten(0, 1), inputs)

    _fit(layer.value, given, adjoint, examples.wanted, examples, VALUE_STEPS, apart=False)


def _fit(
    start: Tensor,
    image: OfWindow,
    adjoint: AddOfWindow,
    wanted: Iterable[Tensor],
    examples: Examples,
    steps: int,
    apart: bool,
) -> None:
    """`steps` steps of `start` towards those whose `image` in every window is `wanted`, by least squares."""

    def total(errors: Iterable[Tensor]) -> Tensor:
        found = start.new_zeros(start.shape)
        for window, error in enumerate(errors):
            adjoint(found, window, error)
        return found

    def normal(weights: Tensor) -> Tensor:
        return total(image(window, weights) for window in range(len(examples.inputs)))

    conjugate_gradients(normal, total(wanted), start, examples.inverse, steps, apart)


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


def conjugate_gradients(normal: Operator, wanted: Tensor, start: Tensor, inverse: Tensor, steps: int, apart: bool) -> None:
    """`steps` steps of `start` [heads,r,e] towards normal(x) = wanted, preconditioned with `inverse` [e,e] on the right.

    Heads are problems of their own where `apart`, else one problem. `wanted` is changed too. Hestenes and Stiefel 1952.
    """

    def inner(one: Tensor, other: Tensor) -> Tensor:
        products = torch.stack([(mine * its).sum() for mine, its in zip(one, other, strict=True)])[:, None, None]
        return products if apart else products.sum(0, keepdim=True)

    tiny = torch.finfo(start.dtype).tiny
    residual = wanted
    residual -= normal(start)
    direction = residual @ inverse
    size = inner(residual, direction)
    for _ in range(steps):
        image = normal(direction)
        length = size / inner(direction, image).clamp_min(tiny)
        start.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        del image
        solved = residual @ inverse
        before, size = size, inner(residual, solved)
        direction *= size / before.clamp_min(tiny)
        direction += solved
        del solved
