"""m heads of r channels become one, and each of them a linear map of it: the ways to choose both.

A sharing takes

    heads    [..., m, r, e]   rows that read an input of e channels
    weights  [..., m, r, r]   Hermitian: how much an error of each head counts, |error|² = errorᴴ · weights · error
    moments  [e, e]           real: second moments of the inputs, E[a aᵀ]

and returns `shared` [..., r, e] and `basis` [..., m, r, r] with heads_g ≈ basis_g · shared. Values and keys that do not rotate
are real, with r = D. A frequency of RoPE is one complex channel, r = 1: multiplying by a complex scalar is all that commutes
with the rotation, and mixing one frequency across heads commutes too, so `basis` folds into the queries of each head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sharing = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ALIGNMENTS = 50  # of generalised Procrustes; it settles in a few
NEGLIGIBLE = 1e-12  # of the largest eigenvalue


def leading(heads: Tensor, weights: Tensor, moments: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The least expected weighted error that any `shared` and `basis` have: a truncated SVD (Eckart and Young 1936).

    With r = 1 it is the leading eigenvector of the m × m matrix of weighted inner products. With `rank`, `shared` has so many
    channels instead of r, and `basis` is [..., m, r, rank].
    """
    m, r = heads.shape[-3:-1]
    rank = rank or r
    root, inverse = square_root(weights)
    inner = gram(heads.flatten(-3, -2), moments)
    weighted = root[..., :, None, :, :] @ inner.unflatten(-1, (m, r)).unflatten(-3, (m, r)).transpose(-3, -2)
    weighted = weighted @ root[..., None, :, :, :].mH
    values, vectors = torch.linalg.eigh(weighted.transpose(-3, -2).flatten(-2).flatten(-3, -2))
    leading = vectors[..., -rank:]
    shared = leading.mH @ (root @ heads).flatten(-3, -2)
    basis = inverse @ leading.unflatten(-2, (m, r))
    gain = _gain(inner.diagonal(dim1=-2, dim2=-1).real.sum(-1) / m, values[..., -rank:].sum(-1))
    return shared * gain, basis / gain[..., None]


def aligned(heads: Tensor, weights: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Heads turned towards each other by unitary matrices, averaged, and given back the norm that averaging takes.

    Generalised Procrustes analysis (Gower 1975), on heads as in "Align Attention Heads Before Merging Them" (Jin et al. 2024,
    arXiv 2412.20677, section 3.2). Every head counts the same: `weights` is not read.
    """
    del weights
    read = reading(heads, moments)
    shared = heads[..., 0, :, :]
    for _ in range(ALIGNMENTS):
        left, _, right = torch.linalg.svd(read @ shared.mH[..., None, :, :])
        basis = left @ right
        shared = (basis.mH @ heads).mean(-3)
    return shared * _gain(_energy(heads, read).mean(-1), _energy(shared, reading(shared, moments))), basis


def averaged(heads: Tensor, weights: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the heads for each of them: what is left where no map can be folded. Nothing but `heads` is read."""
    del weights, moments
    same = torch.eye(heads.shape[-2], dtype=heads.dtype)
    return heads.mean(-3), same.expand(*heads.shape[:-1], -1)


def gram(rows: Tensor, moments: Tensor) -> Tensor:
    """Expected inner products of what rows [..., n, e] read: [..., n, n]."""
    return reading(rows, moments) @ rows.mH


def reading(rows: Tensor, moments: Tensor) -> Tensor:
    """rows · moments; moments are real, which halves the work of complex rows."""
    flat = rows.flatten(0, -2)  # one product: a batch of them, each of a row or two, would read the moments as many times
    if not rows.is_complex():
        return (flat @ moments).view(rows.shape)
    return torch.complex(flat.real.contiguous() @ moments, flat.imag.contiguous() @ moments).view(rows.shape)


def square_root(weights: Tensor) -> tuple[Tensor, Tensor]:
    """S with Sᴴ S = weights, and its inverse. Directions that count for nothing count for next to nothing."""
    values, vectors = torch.linalg.eigh(weights)
    largest = values[..., -1:].amax(dim=-2, keepdim=True)  # of all heads that share
    roots = torch.maximum(values, largest * NEGLIGIBLE).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return roots[..., None] * vectors.mH, vectors / roots[..., None, :]


def _gain(wanted: Tensor, found: Tensor) -> Tensor:
    """[..., 1, 1]: what makes an expected squared norm of `found` one of `wanted`."""
    gain = torch.where(found > 0, wanted / found.clamp_min(torch.finfo(found.dtype).tiny), 1.0).sqrt()
    return gain[..., None, None]


def _energy(heads: Tensor, read: Tensor) -> Tensor:
    return (read * heads.conj()).sum((-2, -1)).real
