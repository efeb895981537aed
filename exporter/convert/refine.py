"""One layer corrected on what it reads: least squares on calibration activations, all of it linear in one weight at a time.

1. W_Q, then W_K: attention scores as the original's. A score's error counts with the original attention probability of its
   place, and after the mean error of its row is taken off, which a softmax does not see. That is the second-order expansion of
   KL(original ‖ converted) of the attention probabilities.
2. W_O, then W_V: the attention's output as wanted, given the probabilities that 1 leads to.

W_O is solved directly, with a ridge. The others have too many unknowns for that: conjugate gradients, started where they are,
preconditioned with the second moments of the inputs, and stopped after few steps, which keeps what the tokens say little about.
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
COLUMNS = 512  # of W_O that are solved for in float64 at a time


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


def refine_scores(
    attention: CausalAttention, original: Original, folded: AttentionWeights, read: Tensor, examples: Examples, rounds: int
) -> AttentionWeights:
    """`folded` with W_Q and W_K corrected `rounds` times; not under QK-norm, where scores are not linear in them.

    `original` reads `read` [n,T,e]. The probabilities of `examples` become the converted layer's: they are the largest thing in
    memory, so they change in their place.
    """
    layer = folded
    for _ in range(rounds if layer.norms is None else 0):
        layer = replace(layer, query=_fit_queries(attention, original, layer, read, examples))
        layer = replace(layer, key=_fit_keys(attention, original, layer, read, examples))
    for window, inputs in enumerate(examples.inputs):
        examples.probabilities[window] = attention.attention(layer, inputs)
    return layer


def refine_output(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> AttentionWeights:
    """`layer` with W_O and W_V corrected, given the probabilities of `examples`."""
    layer = replace(layer, output=_solve_output(attention, layer, examples))
    for _ in range(VALUE_ROUNDS):
        layer = replace(layer, value=_fit_values(attention, layer, examples))
        layer = replace(layer, output=_solve_output(attention, layer, examples))
    return layer


def second_moments(inputs: Tensor) -> Tensor:
    """Inputs [n,T,e] → float64 [e,e], the mean over tokens."""
    total = inputs.new_zeros(inputs.shape[2], inputs.shape[2], dtype=torch.float64)
    for window in inputs:
        total += (window.T @ window).double()
    return total / inputs[..., 0].numel()


def ridge_inverse(moments: Tensor) -> Tensor:
    """Of [e,e] moments; they are changed. What no token reads leaves the ridge alone, which is floored for that."""
    _add_ridge(moments)
    return torch.linalg.inv(moments)


def _add_ridge(moments: Tensor) -> None:
    moments.diagonal().add_((RIDGE * moments.diagonal().mean()).clamp_min(FLOOR))


def _fit_queries(
    attention: CausalAttention, original: Original, layer: AttentionWeights, read: Tensor, examples: Examples
) -> Tensor:
    keys = [attention.project(layer.key, inputs) for inputs in examples.inputs]

    def scores(window: int, query: Tensor) -> Tensor:
        found = attention.scores(attention.project(query, examples.inputs[window]), keys[window])
        return _weighted(examples.probabilities[window], found)

    def adjoint(window: int, errors: Tensor) -> Tensor:
        return attention.project_adjoint(attention.scores_adjoint_query(errors, keys[window]), examples.inputs[window])

    wanted = _wanted_scores(attention, original, read, examples)
    return _fit(layer.query, scores, adjoint, wanted, examples, SCORE_STEPS, apart=True)


def _fit_keys(
    attention: CausalAttention, original: Original, layer: AttentionWeights, read: Tensor, examples: Examples
) -> Tensor:
    queries = [attention.project(layer.query, inputs) for inputs in examples.inputs]

    def scores(window: int, key: Tensor) -> Tensor:
        found = attention.scores(queries[window], attention.project(key, examples.inputs[window]))
        return _weighted(examples.probabilities[window], found)

    def adjoint(window: int, errors: Tensor) -> Tensor:
        back = attention.scores_adjoint_key(errors, queries[window], layer.kv_heads)
        return attention.project_adjoint(back, examples.inputs[window])

    wanted = _wanted_scores(attention, original, read, examples)
    return _fit(layer.key, scores, adjoint, wanted, examples, SCORE_STEPS, apart=True)


def _wanted_scores(attention: CausalAttention, original: Original, read: Tensor, examples: Examples) -> Iterator[Tensor]:
    for inputs, probabilities in zip(read, examples.probabilities, strict=True):
        query, key = (attention.project(heads, inputs) for heads in original)
        yield _weighted(probabilities, attention.scores(query, key))


def _weighted(probabilities: Tensor, scores: Tensor) -> Tensor:
    """Scores less their mean under the probabilities, times those."""
    weighted = probabilities * scores
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


def _fit_values(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> Tensor:
    output = layer.output.flatten(1)

    def given(window: int, value: Tensor) -> Tensor:
        mixed = attention.mixed(replace(layer, value=value), examples.probabilities[window], examples.inputs[window])
        return mixed @ output.T

    def adjoint(window: int, errors: Tensor) -> Tensor:
        """Errors of the output, [T,d] → [G,Dv,e]."""
        heads = (errors @ output).unflatten(1, layer.output.shape[1:]).transpose(0, 1)
        inputs = examples.inputs[window]
        values = attention.mix_adjoint(examples.probabilities[window], heads, layer.kv_heads)
        return attention.gated(layer, values, inputs).mT @ inputs

    return _fit(layer.value, given, adjoint, examples.wanted, examples, VALUE_STEPS, apart=False)


def _fit(
    start: Tensor, image: OfWindow, adjoint: OfWindow, wanted: Iterable[Tensor], examples: Examples, steps: int, apart: bool
) -> Tensor:
    """The weights `start` after `steps` steps towards those whose `image` in every window is `wanted`, by least squares."""

    def normal(weights: Tensor) -> Tensor:
        return _total(adjoint(window, image(window, weights)) for window in range(len(examples.inputs)))

    target = _total(adjoint(window, errors) for window, errors in enumerate(wanted))
    return conjugate_gradients(normal, target, start, examples.inverse, steps, apart)


def _solve_output(attention: CausalAttention, layer: AttentionWeights, examples: Examples) -> Tensor:
    """W_O [d,H,Dv] by least squares, the ridge drawing towards the W_O there is: where that fits, it stays."""
    size = layer.output[0].numel()
    moments = layer.output.new_zeros(size, size, dtype=torch.float64)
    errors = layer.output.new_zeros(size, len(layer.output))
    for inputs, probabilities, wanted in zip(examples.inputs, examples.probabilities, examples.wanted, strict=True):
        mixed = attention.mixed(layer, probabilities, inputs)
        moments += (mixed.T @ mixed).double()
        errors += mixed.T @ (wanted - mixed @ layer.output.flatten(1).T)
    _add_ridge(moments)
    moments = torch.linalg.cholesky(moments)
    parts = [torch.cholesky_solve(part.double(), moments).to(errors.dtype) for part in errors.split(COLUMNS, dim=1)]
    return layer.output + torch.cat(parts, dim=1).T.unflatten(1, layer.output.shape[1:])


def conjugate_gradients(normal: Operator, wanted: Tensor, start: Tensor, inverse: Tensor, steps: int, apart: bool) -> Tensor:
    """`steps` steps towards normal(x) = wanted from `start` [heads,r,e], preconditioned with `inverse` [e,e] on the right.

    Heads are problems of their own where `apart`, else one problem. Hestenes and Stiefel 1952.
    """

    def inner(one: Tensor, other: Tensor) -> Tensor:
        products = (one * other).sum((1, 2), keepdim=True)
        return products if apart else products.sum(0, keepdim=True)

    tiny = torch.finfo(start.dtype).tiny
    residual = wanted - normal(start)
    found, solved = start.clone(), residual @ inverse
    direction, size = solved.clone(), inner(residual, solved)
    for _ in range(steps):
        image = normal(direction)
        length = size / inner(direction, image).clamp_min(tiny)
        found += length * direction  # in place: of a large model each of these is hundreds of megabytes
        residual -= length * image
        del image
        solved = residual @ inverse
        before, size = size, inner(residual, solved)
        direction *= size / before.clamp_min(tiny)
        direction += solved
    return found


def _total(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total
