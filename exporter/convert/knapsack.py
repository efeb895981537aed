"""One choice a layer, the sum of costs against the sum of losses: a grouped (multiple-choice) knapsack, solved exactly.

Layers are taken in one by one. Of all partial sums only those are kept that no other undercuts in both cost and loss, which is
exact: what is undercut now stays undercut, whatever is added (Nemhauser and Ullmann 1969). Costs are whole numbers, so there
are never more partial sums than there are different costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """`choices` holds, for each layer, the number of the option that was taken."""

    cost: int
    loss: float
    choices: tuple[int, ...]


def pareto_front(layers: Sequence[Sequence[tuple[int, float]]]) -> list[Point]:
    """All sums that no other undercuts, by rising cost and falling loss. A layer's options are pairs (cost, loss)."""
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # for each kept sum: the sum it came from, and the option taken
    for options in layers:
        own = np.array([cost for cost, _ in options], np.int64), np.array([loss for _, loss in options])
        every_cost, every_loss = np.add.outer(costs, own[0]).ravel(), np.add.outer(losses, own[1]).ravel()
        order = np.lexsort((every_loss, every_cost))
        lowest = np.minimum.accumulate(every_loss[order])
        kept = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
        costs, losses = every_cost[kept], every_loss[kept]
        steps.append((kept // len(options), kept % len(options)))
    return [Point(int(costs[end]), float(losses[end]), _trace(steps, end)) for end in range(len(costs))]


def _trace(steps: list[tuple[np.ndarray, np.ndarray]], end: int) -> tuple[int, ...]:
    choices: list[int] = []
    for parents, options in reversed(steps):
        choices.append(int(options[end]))
        end = int(parents[end])
    return tuple(reversed(choices))
