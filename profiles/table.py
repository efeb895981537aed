"""The results as tables on a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from exporter.units import size
from profiles import stats
from profiles.noise import busy
from profiles.results import Cell, Results
from profiles.units import milliseconds

OPTIONAL = ("model", "backend", "cache", "dtype", "kind", "batch")  # columns only where they differ; else part of the title

FOLDED = ("model", "backend", "verdict")  # columns of words; a number in two lines would read as another
MANY = 8
APART = "*: not measured in turns, so a drift of the machine may be part of it"
UNSURE = "few samples"
FEW = f"{UNSURE}: under {stats.ENOUGH}, which tell nothing"
ENCODER = "context of an encoder-decoder: the tokens of its input"


def results_view(results: Results) -> Group:
    """For a terminal: what the reader must know first, then the table, then what the KV heads cost in quality."""
    lines = [Text(line) for line in quality_lines(results.cells)]
    return Group(with_warnings([busy(results)], results_table(results)), *lines)


def with_warnings(texts: Iterable[str | None], table: Table) -> Group:
    """A line above the table for each text there is."""
    return Group(*(Text(f"! {text}", style="bold yellow") for text in texts if text), table)


def results_table(results: Results) -> Table:
    """One row a cell. "speed-up" is against the largest G of the same pattern, cache, dtype, batch, context and kind; "≈ 1"
    where its 95 % interval holds 1, "*" where the two were measured apart, nothing where there is no other G. The tail is p99
    from 100 samples on, else the largest."""
    baselines = baseline_cells(results.cells)
    title, varying = constants(results.cells)
    compared = Counter(map(peers, results.cells))
    cells = sorted(results.cells, key=_order)
    speed_ups = [_speed_up(baselines[peers(cell)], cell, compared[peers(cell)]) for cell in cells]
    shown = any(speed_ups)
    table = plain_table(title, "; ".join(_caption(results, speed_ups)))
    tails = [name for name, many in (("p99 ms", True), ("max ms", False)) if many in {_has_p99(c) for c in results.cells}]
    add_columns(table, varying, ("context", "p50 ms", "p90 ms", *tails, "× floor", "KV", *(["speed-up"] * shown)))
    for cell, speed_up in zip(cells, speed_ups, strict=True):
        times = stats.summary(cell.samples)
        tail = {"p99 ms": times.p99, "max ms": None if times.p99 else times.max}
        row = [
            cell.subject.groups_label,
            cell.subject.pattern,
            *(optional(cell)[name] for name in varying),
            f"{cell.context:,}",
            milliseconds(times.p50),
            milliseconds(times.p90),
            *("" if (value := tail[name]) is None else milliseconds(value) for name in tails),
            f"{times.p50 / cell.floor:.2f}" if cell.floor else "",
            size(cell.subject.kv_bytes_per_token),
            *([speed_up] * shown),
        ]
        table.add_row(*values(row))
    return table


def quality_lines(cells: Iterable[Cell]) -> list[str]:
    """What was measured of each number of KV heads beside its latency: "quality, G = 3: cross-entropy 2.6 nats a token"."""
    cells = [cell for cell in cells if cell.quality]
    models = {cell.subject.model for cell in cells}
    lines = []
    for cell in sorted(cells, key=lambda cell: -cell.subject.mean_groups):
        names = [f"G = {cell.subject.groups_label}"] + ([cell.subject.model] if len(models) > 1 else [])
        figures = [(*name.partition(", "), value) for name, value in (cell.quality or {}).items()]
        text = ", ".join(f"{name} {f'{value:#.4g}'.rstrip('.')} {unit}".strip() for name, _, unit, value in figures)
        lines.append(f"quality, {', '.join(names)}: {text}")
    return list(dict.fromkeys(lines))


def plain_table(title: str, caption: str) -> Table:
    """An empty table with as few lines as one can be read with; no text in it is taken for markup."""
    return Table(title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def add_columns(table: Table, varying: tuple[str, ...], figures: tuple[str, ...]) -> None:
    """KV heads, pattern, what varies, figures. A terminal that is too narrow breaks values over lines rather than cut them.

    no_wrap has Rich take width from the other columns first; the texts' own no_wrap=False (see `values`) breaks them still.
    Many columns stand closer together, so that they fit into 80 characters.
    """
    table.padding = (0, int(len(varying) + len(figures) < MANY), 0, 0)
    table.add_column("KV heads", justify="right", overflow="fold")
    for name in ("pattern", *varying):
        table.add_column(Text(name, no_wrap=False), overflow="fold", no_wrap=name not in FOLDED)
    for name in figures:
        table.add_column(Text(name, no_wrap=False), justify="right", overflow="fold", no_wrap=name not in FOLDED)


def values(row: Iterable[str]) -> list[Text]:
    """The texts of one row, none of which is cut."""
    return [Text(value, no_wrap=False) for value in row]


def optional(cell: Cell) -> dict[str, str]:
    """The values of the OPTIONAL columns."""
    subject = cell.subject
    values = (subject.model, cell.backend, subject.cache, subject.dtype, cell.kind, str(cell.batch))
    return dict(zip(OPTIONAL, values, strict=True))


def constants(cells: Iterable[Cell]) -> tuple[str, tuple[str, ...]]:
    """A title of what all cells share, and the names of what differs."""
    cells = list(cells)
    rows = [optional(cell) for cell in cells]
    varying = [name for name in OPTIONAL if len({row[name] for row in rows}) > 1]
    if len({(cell.subject.pattern, cell.subject.cache) for cell in cells}) == len({cell.subject.pattern for cell in cells}):
        varying = [name for name in varying if name != "cache"]  # each pattern has its own: the name of the pattern tells
    shared = {name: rows[0][name] for name in OPTIONAL if len({row[name] for row in rows}) == 1}
    return " · ".join(f"batch {value}" if name == "batch" else value for name, value in shared.items()), tuple(varying)


def peers(cell: Cell) -> tuple[object, ...]:
    """Everything but the KV heads: cells that agree in it are compared across KV heads."""
    return cell.subject.pattern, cell.provider, cell.context, *optional(cell).values()


def baseline_cells(cells: Iterable[Cell]) -> dict[tuple[object, ...], Cell]:
    """The cell with the most KV heads among each one's peers."""
    baselines: dict[tuple[object, ...], Cell] = {}
    for cell in cells:
        best = baselines.get(peers(cell))
        if best is None or cell.subject.mean_groups > best.subject.mean_groups:
            baselines[peers(cell)] = cell
    return baselines


def _has_p99(cell: Cell) -> bool:
    return len(cell.samples) >= stats.TAIL


def _speed_up(baseline: Cell, cell: Cell, compared: int) -> str:
    if cell is baseline:
        return "1" if compared > 1 else ""
    low, high = stats.ratio_interval(baseline.samples, cell.samples, block=max(baseline.burst, cell.burst))
    if high == math.inf:
        return UNSURE
    text = "≈ 1" if low <= 1 <= high else f"{stats.median(baseline.samples) / stats.median(cell.samples):.2f}"
    return text + (" *" if baseline.cohort != cell.cohort else "")


def _order(cell: Cell) -> tuple[object, ...]:
    subject = cell.subject
    where = (subject.model, cell.backend, cell.kind, cell.batch, cell.context)
    return *where, subject.pattern, subject.cache, subject.dtype, -subject.mean_groups


def _caption(results: Results, speed_ups: Sequence[str]) -> Iterator[str]:
    if results.bandwidth:
        yield f"floor: weights + KV at {results.bandwidth.best / 1e9:.1f} GB/s, the best read bandwidth of this run"
    yield "KV: cache of one token"
    if any(speed_ups):
        yield "speed-up: against the most KV heads, all else equal"
    said = " ".join(speed_ups)
    yield from (words for sign, words in (("≈", "≈ 1: within the noise"), ("*", APART), (UNSURE, FEW)) if sign in said)
    if any(cell.subject.encoder for cell in results.cells):
        yield ENCODER
