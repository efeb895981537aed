"""The report's figures of latency: each is panels of SVG, a legend, a sentence, and the table of what is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from profiles.report_data import Row, group_labels, grouped, place_label, slope_of
from profiles.report_svg import Point, Series, line_chart, nice_axis, ordinal_axis, swatch
from profiles.results import KIND_NAMES, KINDS
from profiles.units import milliseconds, rounded

KV_HEADS = "KV heads"
CELL = (KV_HEADS, "series", "kind", "batch", "context")
STATISTICS = ("p50 ms", "p10 ms", "p90 ms", "p99 ms", "max ms", "samples", "floor ms", "× floor")
PATTERNS = ("grouped", "repeat", "attention", "gqa", "fused")  # which has which colour where nothing else tells series apart
NUMBER = re.compile(r"[-+\d][\d.,e+]*( [kMGT]?B)?|")
DIRECT = 11  # characters of a label that fits beside its line


@dataclass(frozen=True)
class Table:
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The CSS class of each column: "n" where it holds numbers, which end at the right."""
        return tuple("n" if all(NUMBER.fullmatch(row[i]) for row in self.rows) else "" for i in range(len(self.headings)))


@dataclass(frozen=True)
class Figure:
    """`panels` are (heading, chart) pairs; `legend` (swatch, name) pairs, empty where the lines carry their names."""

    anchor: str
    title: str
    words: str
    panels: tuple[tuple[str, Markup], ...]
    table: Table
    legend: tuple[tuple[Markup, str], ...] = ()


class Styles:
    """Which CSS class and marker a series or a KV-head count has: the same one in every figure."""

    def __init__(self, rows: Sequence[Row]) -> None:
        rank = {row.series: PATTERNS.index(row.subject.pattern) for row in rows if row.subject.pattern in PATTERNS}
        if len(set(rank.values())) == len(rank) == len({row.series for row in rows}):
            self.series = rank
        else:
            labels = sorted({row.series for row in rows}, key=lambda label: (rank.get(label, len(PATTERNS)), label))
            self.series = {label: index for index, label in enumerate(labels)}
        self.groups = {label: index for index, label in enumerate(group_labels(rows))}

    def of_series(self, label: str) -> tuple[str, int]:
        return f"s{self.series[label] % 8}", self.series[label]

    def of_groups(self, label: str) -> tuple[str, int]:
        return f"g{self.groups[label]}", self.groups[label]


def latency_by_groups(rows: Sequence[Row], styles: Styles, kind: str) -> Figure | None:
    """p50 with p10–p90 whiskers against KV heads, a panel for each context and batch, a line for each series; and the floor."""
    rows = [row for row in rows if row.cell.kind == kind]
    if not rows:
        return None
    panels, floors_drawn = [], False
    for place, part in grouped(rows, lambda row: row.place).items():
        names = group_labels(part)
        lines = [
            Series(label, styles.of_series(label)[0], _points(line, names), styles.of_series(label)[1])
            for label, line in grouped(part, lambda row: row.series).items()
        ]
        if floors := _floors(part):
            floors_drawn = True
            points = [Point(i, floors[name] * 1e3, "") for i, name in enumerate(names) if name in floors]
            lines.append(Series("floor", "muted", tuple(points), None))
        y = nice_axis("ms a step" if kind == "decode" else "ms", [row.times.p90 * 1e3 for row in part])
        direct = all(len(line.label) <= DIRECT for line in lines)
        heading = place_label(place, rows)
        panels.append((heading, line_chart(f"{KIND_NAMES[kind]}, {heading}", lines, ordinal_axis(KV_HEADS, names), y, direct)))
    words = {
        "decode": "Time to add one token to every sequence of the batch.",
        "prefill": "Time to take in the whole context.",
        "ttft": "Prefill of the whole context and the choice of the next token.",
    }[kind]
    title = {"decode": "Latency by KV heads", "prefill": "Prefill", "ttft": "Time to first token"}[kind]
    words += " Dashed: what memory bandwidth allows at best." * floors_drawn + " Whiskers: p10 to p90."
    legend = _legend(rows, styles, floors_drawn)
    return Figure(f"{kind}-by-groups", title, words, tuple(panels), times_table(rows), legend)


def latency_by_context(rows: Sequence[Row], styles: Styles) -> Figure | None:
    """p50 against context, a panel for each series and batch, a line for each KV-head count; slopes in the table."""
    rows = [row for row in rows if row.cell.kind == "decode"]
    if len({row.cell.context for row in rows}) < 2:
        return None
    x = nice_axis("tokens of context", [row.cell.context for row in rows], binary=True)
    panels, slopes = [], []
    for (series, batch), part in grouped(rows, lambda row: (row.series, row.cell.batch)).items():
        y = nice_axis("ms a step", [row.times.p90 * 1e3 for row in rows if row.cell.batch == batch])
        lines = []
        for label, line in sorted(grouped(part, lambda row: row.groups).items(), key=lambda i: -styles.groups[i[0]]):
            line = sorted(line, key=lambda row: row.cell.context)
            style, shape = styles.of_groups(label)
            lines.append(Series(f"G = {label}", style, tuple(_point(row, row.cell.context) for row in line), shape))
            steps = [(f"{row.cell.context:,}", milliseconds(row.times.p50)) for row in line]
            text = ", ".join(f"{ms} at {context}" for context, ms in steps)
            slopes.append((label, series, str(batch), text, *_slope(line)))
        heading = series + (f", batch {batch}" if len({row.cell.batch for row in rows}) > 1 else "")
        direct = all(len(line.label) <= DIRECT for line in lines)
        panels.append((heading, line_chart(f"Latency by context, {heading}", lines, x, y, direct)))
    words = (
        "The slope is what the KV cache costs: bytes read for each token that is already there. The panels of one batch share "
        "a scale."
    )
    if any(slope[-2] for slope in slopes):
        words += (
            " The slope's floor is the larger of those bytes over the read bandwidth and of attention's arithmetic, which is "
            "the same for every number of KV heads, over the machine's."
        )
    ours = ("ms for each 1,000 tokens more", "95 % interval", "floor of that, ms", "× floor")
    table = _filled((KV_HEADS, "series", "batch", "p50 ms at context", *ours), slopes)
    return Figure("by-context", "Latency by context", words, tuple(panels), table, _groups_legend(styles, slopes))


def ratio_to_floor(rows: Sequence[Row], styles: Styles) -> Figure | None:
    """p50 over the floor against KV heads."""
    rows = [row for row in rows if row.ratio is not None]
    if not rows:
        return None
    panels = []
    y = nice_axis("× floor", [row.ratio or 1 for row in rows])
    for place, part in grouped(rows, lambda row: row.place).items():
        names = group_labels(part)
        lines = []
        for label, line in grouped(part, lambda row: row.series).items():
            style, shape = styles.of_series(label)
            points = [_ratio_point(row, names) for row in sorted(line, key=lambda row: row.subject.mean_groups)]
            lines.append(Series(label, style, tuple(points), shape))
        lines.append(Series("floor", "muted", tuple(Point(i, 1.0, "") for i in range(len(names))), None))
        direct = all(len(line.label) <= DIRECT for line in lines)
        heading = place_label(place, rows)
        panels.append((heading, line_chart(f"Ratio to floor, {heading}", lines, ordinal_axis(KV_HEADS, names), y, direct)))
    words = (
        "p50 over (weights + KV bytes of the context) / the best read bandwidth of all its machine's runs. At 1 the memory is "
        "the limit and nothing is left to gain; a model that fits into the last-level cache can be below."
    )
    return Figure(
        "floor", "Distance from the floor", words, tuple(panels), times_table(rows), _legend(rows, styles, floor=True)
    )


def times_table(rows: Sequence[Row]) -> Table:
    """Every statistic of the rows, one line a cell; what none of them has is left out."""
    ordered = sorted(rows, key=lambda row: KINDS.index(row.cell.kind))
    return _filled((*CELL, *STATISTICS), [_times(row) for row in ordered])


def _filled(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Without the columns that are empty."""
    shown = [index for index in range(len(headings)) if any(line[index] for line in lines)]
    return Table(tuple(headings[i] for i in shown), tuple(tuple(line[i] for i in shown) for line in lines))


def _floors(part: Sequence[Row]) -> dict[str, float]:
    """Seconds by KV-head label; empty where rows of one label differ, since one line could not show them.

    Runs of one machine share a floor up to rounding: it was rescaled from the bandwidth of each.
    """
    floors: dict[str, float] = {}
    for row in part:
        if row.cell.floor and not math.isclose(floors.setdefault(row.groups, row.cell.floor), row.cell.floor):
            return {}
    return floors


def _slope(line: Sequence[Row]) -> tuple[str, str, str, str]:
    """The slope, its interval, its floor and their ratio; a cost that may be none at all says so."""
    slope = slope_of(line)
    if slope is None:
        return "", "", "", ""
    low, high = (rounded(end, slope.low, slope.high) for end in (slope.low, slope.high))
    text = slope.text if slope.sure else f"{slope.text} (within the noise)"
    return text, f"{low} to {high}", f"{slope.floor:.3g}" if slope.floor else "", slope.ratio


def _times(row: Row) -> tuple[str, ...]:
    cell, t = row.cell, row.times
    return (
        *(row.groups, row.series, cell.kind, str(cell.batch), f"{cell.context:,}"),
        *(milliseconds(value) for value in (t.p50, t.p10, t.p90)),
        *(milliseconds(t.p99) if t.p99 else "", "" if t.p99 else milliseconds(t.max)),
        *(str(t.count), milliseconds(cell.floor) if cell.floor else "", f"{row.ratio:.2f}" if row.ratio else ""),
    )


def _points(line: Sequence[Row], names: Sequence[str]) -> tuple[Point, ...]:
    ordered = sorted(line, key=lambda row: row.subject.mean_groups)
    return tuple(_point(row, names.index(row.groups)) for row in ordered)


def _point(row: Row, x: float) -> Point:
    low, middle, high = (value * 1e3 for value in (row.times.p10, row.times.p50, row.times.p90))
    where = f"{row.series}, G = {row.groups}, {row.cell.context:,} tokens"
    ratio = f", {row.ratio:.2f} × floor" if row.ratio else ""
    spread = f"{milliseconds(low / 1e3)} – {milliseconds(high / 1e3)}"
    return Point(x, middle, f"{where}: p50 {milliseconds(middle / 1e3)} ms (p10 – p90 {spread}){ratio}", low, high)


def _ratio_point(row: Row, names: Sequence[str]) -> Point:
    text = f"{row.series}, G = {row.groups}: {row.ratio or 0:.2f} × floor"
    return Point(names.index(row.groups), row.ratio or 0.0, text)


def _legend(rows: Sequence[Row], styles: Styles, floor: bool) -> tuple[tuple[Markup, str], ...]:
    labels = list(dict.fromkeys(row.series for row in rows))
    if all(len(label) <= DIRECT for label in labels):
        return ()
    floors = [(swatch("muted", None), "floor")] if floor else []
    return (*((swatch(*styles.of_series(label)), label) for label in labels), *floors)


def _groups_legend(styles: Styles, slopes: Sequence[tuple[str, ...]]) -> tuple[tuple[Markup, str], ...]:
    labels = sorted({slope[0] for slope in slopes}, key=lambda label: styles.groups[label])
    if all(len(f"G = {label}") <= DIRECT for label in labels):
        return ()
    return tuple((swatch(*styles.of_groups(label)), f"G = {label}") for label in labels)
