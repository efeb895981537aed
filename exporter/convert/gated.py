"""Gated values shared by m heads: which channel of each goes with which, and by what factor.

V' = (W_V x) ⊙ SiLU(W_gate x) is not linear in x. What folds into W_O is V'_h ≈ B_h Ṽ' with one entry in every row and column of
B_h: channels may change places, and the value half may be scaled (its sign too), the gate half may not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from exporter.convert.sharing import reading

ROUNDS = 4  # of matching the heads to their mean; it settles in a few


def matched(value: Tensor, gate: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """value, gate [G,m,Dv,e] → shared value and gate [G,Dv,e], and the basis [G,m,Dv,Dv] with V'_gm ≈ basis · shared.

    Channels are matched by the cosine of their gates times that of their values, whatever its sign. The shared halves are means
    of what is matched, with the norm that averaging takes given back to gates (of values the basis has it).
    """
    groups = [_match(*halves, moments) for halves in zip(value, gate, strict=True)]
    values, gates, bases = (torch.stack(parts) for parts in zip(*groups, strict=True))
    return values, gates, bases


def _match(value: Tensor, gate: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One group: [m,Dv,e] → [Dv,e], [Dv,e], [m,Dv,Dv]."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and only this needs it

    m, Dv = value.shape[:2]
    shared, shared_gate = value[0], gate[0]
    for _ in range(ROUNDS):
        likeness = _cosines(value, shared, moments).abs() * _cosines(gate, shared_gate, moments)
        places = torch.from_numpy(np.stack([linear_sum_assignment(-head.T.numpy())[1] for head in likeness]))
        index = places[..., None].expand(-1, -1, value.shape[2])
        values, gates = value.gather(1, index), gate.gather(1, index)
        signs = torch.where((values * reading(shared, moments)).sum(-1, keepdim=True) < 0, -1.0, 1.0).to(value.dtype)
        shared, shared_gate = (values * signs).mean(0), gates.mean(0)
    wanted, found = _squares(gates, moments).mean(0), _squares(shared_gate, moments)
    shared_gate = shared_gate * _ratio(wanted, found, 1.0).sqrt()[:, None]
    scales = _ratio((values * reading(shared, moments)).sum(-1), _squares(shared, moments), 0.0)
    basis = value.new_zeros(m, Dv, Dv)
    basis.scatter_(1, places[:, None, :], scales[:, None, :])
    return shared, shared_gate, basis


def _squares(rows: Tensor, moments: Tensor) -> Tensor:
    return (rows * reading(rows, moments)).sum(-1)


def _cosines(rows: Tensor, others: Tensor, moments: Tensor) -> Tensor:
    """[m,r,e] and [r,e] → [m,r,r]."""
    lengths = (_squares(rows, moments)[..., None] * _squares(others, moments)).clamp_min(0).sqrt()
    return _ratio(reading(rows, moments) @ others.T, lengths, 0.0)


def _ratio(one: Tensor, other: Tensor, empty: float) -> Tensor:
    """one / other, and `empty` where there is nothing to divide by."""
    return torch.where(other > 0, one / other.clamp_min(torch.finfo(other.dtype).tiny), empty)
