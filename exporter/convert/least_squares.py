"""Weights by least squares on what they read, a few steps of conjugate gradients, stated among tokens.

Weights W [heads,r,e] are read as X·Wᵀ, the tokens X being [N,e], and whatever is fitted is linear in that. Residuals are then
Bᵀ·X and directions Dᵀ·X·P, with P [e,e] the preconditioner and B and D [N,heads·r]. All that a step asks for is X·P·Xᵀ·B: where
tokens are fewer than two times e, one product of matrices, and three among weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LEFT = 16.0  # roundings that a residual may be and yet mean nothing

Normal = Callable[[int, Tensor], Tensor]  # of a window, by its number, X·Wᵀ → AᵀA·X·Wᵀ, both [T,heads,r]


class Tokens:
    """X, the `inputs` [n,T,e] of n windows, and the preconditioner `inverse` [e,e]."""

    def __init__(self, inputs: Tensor, inverse: Tensor) -> None:
        self.inputs, self.inverse = inputs, inverse
        self.rows = inputs.flatten(0, 1)
        tokens, width = self.rows.shape
        self.kernel = self.rows @ inverse @ self.rows.T if tokens < 2 * width else None

    def read(self, weights: Tensor) -> Tensor:
        """[heads,r,e] → X·Wᵀ [n,T,heads,r]."""
        return (self.rows @ weights.flatten(0, 1).T).view(*self.inputs.shape[:2], *weights.shape[:2])

    def read_solved(self, dual: Tensor) -> Tensor:
        """X·P·Xᵀ of [n,T,heads,r]: what weights P·Xᵀ·dual give."""
        B = dual.view(len(self.rows), -1)
        found = self.rows @ (self.inverse @ (self.rows.T @ B)) if self.kernel is None else self.kernel @ B
        return found.view(dual.shape)

    def weights(self, dual: Tensor) -> Tensor:
        """[n,T,heads,r] → (P·Xᵀ·dual)ᵀ [heads,r,e]."""
        return (dual.view(len(self.rows), -1).T @ self.rows @ self.inverse).view(*dual.shape[2:], -1)


def conjugate_gradients(
    normal: Normal, wanted: Iterable[Tensor], start: Tensor, tokens: Tokens, steps: int, apart: bool
) -> None:
    """`steps` steps of the weights `start` [heads,r,e] towards normal(X·Wᵀ) = wanted, a window [T,heads,r] at a time.

    Heads are problems of their own where `apart`, else one problem.
    """
    start += tokens.weights(_change(normal, wanted, start, tokens, steps, apart))


def _change(normal: Normal, wanted: Iterable[Tensor], start: Tensor, tokens: Tokens, steps: int, apart: bool) -> Tensor:
    """What to add, [n,T,heads,r]: its `weights`. Hestenes and Stiefel 1952."""

    def inner(one: Tensor, other: Tensor) -> Tensor:
        products = torch.stack([(mine * its).sum((0, 2)) for mine, its in zip(one, other, strict=True)]).sum(0)[:, None]
        return products if apart else products.sum(0, keepdim=True)

    residual = tokens.read(start)
    for window, whole in enumerate(wanted):
        residual[window] = whole - normal(window, residual[window])
    found, direction, given = (torch.zeros_like(residual) for _ in range(3))  # given: what tokens read of the direction
    floats, before = torch.finfo(residual.dtype), residual.new_tensor(torch.inf)
    # Less than this is rounding: of what no weights can mend (X·P·Xᵀ is at most the number of tokens), or of what is mended.
    rounding, least = LEFT * floats.eps * len(tokens.rows), floats.eps * inner(residual, residual)
    for _ in range(steps):
        solved = tokens.read_solved(residual)
        size = inner(residual, solved)
        size *= size > rounding * torch.maximum(inner(residual, residual), least)
        direction.mul_(size / before).add_(residual)
        given.mul_(size / before).add_(solved)
        before, image = size.clamp_min(floats.tiny), solved  # in its place
        for window, read in enumerate(given):
            image[window] = normal(window, read)
        length = size / inner(given, image).clamp_min(floats.tiny)
        found.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        del solved, image
    return found
