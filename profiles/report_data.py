"""What the report's figures and words are made from: every cell with its statistics, its series and its place on the axes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from profiles import stats
from profiles.results import Cell, Results, Subject
from profiles.units import rounded

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class Row:
    """One cell. `series` names what the figure draws as one line: the pattern, and what else its cells differ in."""

    run: int
    cell: Cell
    times: stats.Summary
    series: str
    token_floor: float | None  # seconds that a further token of context must cost (see _token_floor)

    @property
    def subject(self) -> Subject:
        return self.cell.subject

    @property
    def groups(self) -> str:
        return self.cell.subject.groups_label

    @property
    def quality(self) -> dict[str, float]:
        return self.cell.quality or {}

    @property
    def breakdown(self) -> dict[str, float]:
        return self.cell.breakdown or {}

    @property
    def ratio(self) -> float | None:
        """p50 over the floor."""
        return self.times.p50 / self.cell.floor if self.cell.floor else None

    @property
    def place(self) -> tuple[int, int]:
        return self.cell.batch, self.cell.context


@dataclass(frozen=True)
class Slope:
    """Milliseconds for each 1,000 tokens more, with their 95 % bootstrap interval, and what they must be at least; `sure`
    when 0 lies below the interval."""

    value: float
    low: float
    high: float
    draws: np.ndarray
    floor: float | None

    @property
    def sure(self) -> bool:
        return self.low > 0

    @property
    def text(self) -> str:
        return rounded(self.value, self.low, self.high)

    @property
    def ratio(self) -> str:
        """Over its floor, in the digits that were measured; empty where that is not known, or the slope may be none."""
        return rounded(*(end / self.floor for end in (self.value, self.low, self.high))) if self.floor and self.sure else ""


def slope_of(line: Sequence[Row]) -> Slope | None:
    """Of the rows of one series and one number of KV heads; None with fewer than two contexts."""
    contexts, block = [row.cell.context for row in line], max((row.cell.burst for row in line), default=1)
    value = stats.slope(contexts, [row.times.p50 for row in line])
    draws = stats.slopes(contexts, [row.cell.samples for row in line], block=block)
    floor = line[0].token_floor if line else None
    if value is None or draws is None:
        return None
    return Slope(value, *stats.interval(draws), draws, floor and floor * 1e6)


Dimension = Callable[[int, Cell], str]
DIMENSIONS: tuple[Dimension, ...] = (
    lambda run, cell: cell.subject.cache,
    lambda run, cell: cell.subject.dtype,
    lambda run, cell: cell.backend,
    lambda run, cell: cell.provider.removesuffix("ExecutionProvider"),
    lambda run, cell: cell.subject.model,
)
LAST_RESORTS: tuple[Dimension, ...] = (
    lambda run, cell: f"run {run + 1}",
    lambda run, cell: cell.subject.variant,
    lambda run, cell: cell.subject.bundle,
)


def rows_of(results: Sequence[Results]) -> list[Row]:
    """All cells of all runs, ordered by kind, batch, context, series and KV heads (most first)."""
    found = [(run, *both) for run, result in enumerate(results) for both in _with_floors(result, results)]
    pairs = [(run, cell) for run, cell, _ in found]
    places = _place_labels(results)
    chosen = [name for name in (*DIMENSIONS, lambda run, cell: places[run]) if _tells_apart(name, pairs)]
    for extra in (None, *LAST_RESORTS):
        chosen += [extra] if extra else []
        labels = [" · ".join([cell.subject.pattern, *(name(run, cell) for name in chosen)]) for run, cell in pairs]
        if max(Counter(map(_identity, pairs, labels)).values(), default=0) < 2:
            break
    rows = [
        Row(run, cell, stats.summary(cell.samples), label, floor)
        for (run, cell, floor), label in zip(found, labels, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.cell.kind, *row.place, row.series, -row.subject.mean_groups))


def _with_floors(result: Results, all_results: Sequence[Results]) -> Iterator[tuple[Cell, float | None]]:
    """The cells of `result`, their floors those of the best bandwidth and arithmetic of all runs on its machine with as many
    threads: a floor belongs to a machine, not to a moment."""
    same = [other for other in all_results if _place(other) == _place(result)]
    bandwidth = max((other.bandwidth.best for other in same if other.bandwidth), default=None)
    operations = max((other.arithmetic.best for other in same if other.arithmetic), default=None)
    for cell in result.cells:
        if cell.floor and result.bandwidth and bandwidth:
            scaled = dataclasses.replace(cell, floor=cell.floor * (result.bandwidth.best / bandwidth))
            yield scaled, _token_floor(cell, bandwidth, operations)
        else:
            yield cell, None


def _token_floor(cell: Cell, bandwidth: float, operations: float | None) -> float | None:
    """Seconds: the larger of its KV bytes over the bandwidth and, on a CPU, its arithmetic over the machine's; None where that
    is not known, as the floor might then be too low."""
    memory = cell.batch * cell.subject.kv_bytes_per_token / bandwidth
    if not cell.provider.lower().startswith("cpu"):
        return memory
    if not operations or not cell.subject.attention_operations:
        return None
    return max(memory, cell.batch * cell.subject.attention_operations / operations)


def _place_labels(results: Sequence[Results]) -> list[str]:
    """Of each run, where it was measured: as much of it as some runs differ in."""
    columns = list(zip(*map(_place, results), strict=True))
    differ = [len(set(column)) > 1 for column in columns]
    return [", ".join(str(part) for part, shown in zip(_place(result), differ, strict=True) if shown) for result in results]


def _place(result: Results) -> tuple[object, ...]:
    machine, threads = result.machine, result.settings.get("threads")
    gpus = " + ".join(machine.gpus) or "no GPU"
    return machine.cpu, f"{machine.cpus} CPUs", gpus, f"{threads or 'all'} threads"


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, keys in the order they first appear."""
    parts: dict[K, list[T]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts


def group_labels(rows: Iterable[Row]) -> list[str]:
    """The KV-head labels on an axis, fewest first."""
    means = {row.groups: row.subject.mean_groups for row in rows}
    return sorted(means, key=lambda label: (means[label], label))


def place_label(place: tuple[int, int], rows: Iterable[Row]) -> str:
    """ "4,096 tokens of context", and the batch where batches differ."""
    batch, context = place
    several = len({row.cell.batch for row in rows}) > 1
    return f"{context:,} tokens of context" + (f", batch {batch}" if several else "")


def name_and_unit(metric: str) -> tuple[str, str]:
    """ "cross-entropy, nats a token" apart; a metric without a comma has no unit."""
    name, _, unit = metric.partition(", ")
    return name, unit


def _tells_apart(name: Dimension, pairs: Sequence[tuple[int, Cell]]) -> bool:
    """Whether a pattern comes with several values: each pattern's own cache form, for one, goes without saying."""
    parts = grouped(pairs, lambda pair: pair[1].subject.pattern)
    return any(len({name(*pair) for pair in part}) > 1 for part in parts.values())


def _identity(pair: tuple[int, Cell], label: str) -> tuple[object, ...]:
    cell = pair[1]
    return label, cell.subject.groups_label, cell.batch, cell.context, cell.kind
