"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5) that also runs on sharded parameters.

The same as torch.optim.Adafactor, whose steps in place are refused on the DTensors of FSDP2. The second moments of a matrix
are kept as those of its rows and columns: next to no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

DECAY = -0.8  # the second moments' memory after t steps is 1 − t^DECAY
SMALLEST = 1e-3  # a matrix counts as at least this large (root mean square)
CLIP = 1.0  # root mean square of an update
EPS = torch.finfo(torch.float32).eps


class Adafactor(torch.optim.Optimizer):
    """`lr` is the size of a step as a share of each parameter's root mean square (at most 1/√t). Vectors are not factored."""

    def __init__(self, parameters: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], float(group["lr"]))

    def _update(self, parameter: Tensor, state: dict[str, Tensor], lr: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        squares = gradient.square()
        means = {"row": _mean(squares, -1), "column": _mean(squares, -2)} if squares.dim() > 1 else {"all": squares}
        if not state:
            state.update({name: torch.zeros_like(mean) for name, mean in means.items()})
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        step = state["step"].item()
        for name, mean in means.items():
            state[name].lerp_(mean, step**DECAY)
        if squares.dim() > 1:
            row = state["row"]
            variance = row * state["column"] / _mean(row, -2).clamp(min=EPS)
        else:
            variance = state["all"]
        update = variance.clamp(min=EPS * EPS).rsqrt() * gradient
        size = max(SMALLEST, _rms(parameter)) * min(lr, step**-0.5)
        parameter.sub_(update * (size / max(1.0, _rms(update) / CLIP)))


def _mean(x: Tensor, dim: int) -> Tensor:
    """Kept as a dimension of one. Of shards, which may be unequal, the sum is what adds up."""
    total = x.sum(dim, keepdim=True) / x.shape[dim]
    if isinstance(total, DTensor):
        return total.redistribute(placements=[Replicate() if one.is_partial() else one for one in total.placements])
    return total


def _rms(x: Tensor) -> float:
    total = x.square().sum()
    whole = total.full_tensor() if isinstance(total, DTensor) else total
    return float((whole / x.numel()).sqrt())
