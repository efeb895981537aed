"""Small charts as inline SVG: colours come from CSS variables, so one drawing serves light and dark, and needs no script.

Every text is escaped here. Sizes are in the units of a view box 360 wide, which a page shows at about one pixel a unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 236
LEFT, TOP, BOTTOM = 44, 26, 42
LABEL_PITCH = 13
CHARACTER = 6.4  # mean width of a character of a direct label
ROW_LABEL = 24  # characters of a bar's label; its parts' texts name it in full
SHAPES = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>',
    '<rect x="{x:.1f}" y="{y:.1f}" width="6.6" height="6.6" transform="translate(-3.3 -3.3)"/>',
    '<path d="M{x:.1f} {y:.1f}m0 -4.8l4.8 4.8l-4.8 4.8l-4.8 -4.8z"/>',
    '<path d="M{x:.1f} {y:.1f}m0 -4.6l4.5 7.8h-9z"/>',
)


@dataclass(frozen=True)
class Point:
    """One value with its whisker `low` … `high` and the text a pointer shows."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points joined by a line in the colour of CSS class `style`; `shape` picks the marker, None draws a dashed line alone."""

    label: str
    style: str
    points: tuple[Point, ...]
    shape: int | None = 0


@dataclass(frozen=True)
class Axis:
    """`ticks` are (position, label) pairs; `low` … `high` is what the axis spans."""

    label: str
    ticks: tuple[tuple[float, str], ...]
    low: float
    high: float


def line_chart(name: str, series: Sequence[Series], x: Axis, y: Axis, direct_labels: bool = True) -> Markup:
    """Lines with markers and whiskers, labelled at their right ends. `name` says it all to a screen reader."""
    longest = max((len(s.label) for s in series), default=0) if direct_labels else 0
    right = WIDTH - (longest * CHARACTER + 14 if longest else 12)
    bottom = HEIGHT - BOTTOM

    def px(value: float) -> float:
        return LEFT + (value - x.low) / (x.high - x.low) * (right - LEFT)

    def py(value: float) -> float:
        return bottom - (value - y.low) / (y.high - y.low) * (bottom - TOP)

    parts = [_frame(x, y, right, bottom, px, py)]
    ends = []
    for s in series:
        path = " ".join(f"{px(p.x):.1f},{py(p.y):.1f}" for p in s.points)
        dashed = Markup(' stroke-dasharray="5 4" opacity="0.8"') if s.shape is None else ""
        body = [Markup('<polyline class="line" points="{}"{}/>').format(path, dashed)]
        body += [_marker(p, s.shape, px, py) for p in s.points]
        parts.append(Markup('<g class="{}">{}</g>').format(s.style, Markup("").join(body)))
        if s.points:
            ends.append((py(s.points[-1].y), px(s.points[-1].x), s))
    if direct_labels:
        parts.append(_end_labels(ends, bottom))
    return _svg(name, HEIGHT, parts)


def stacked_bars(name: str, rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], x: Axis) -> Markup:
    """Horizontal bars; a row is (label, parts), a part (CSS class, text a pointer shows, length)."""
    pitch, thick = 26, 16
    left = min(ROW_LABEL, max(len(label) for label, _ in rows)) * CHARACTER + 12
    right, bottom = WIDTH - 16, 8 + pitch * len(rows)
    scale = (right - left) / (x.high - x.low)
    parts = []
    for at, label in x.ticks:
        column = left + (at - x.low) * scale
        parts.append(Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1}"/>').format(column, bottom))
        parts.append(_text(column, bottom + 16, label, "middle"))
    for index, (label, pieces) in enumerate(rows):
        top = 8 + index * pitch
        short = label if len(label) <= ROW_LABEL else label[: ROW_LABEL - 1] + "…"
        parts.append(_text(left - 8, top + thick - 4, short, "end"))
        column = left
        for style, title, length in pieces:
            width = length * scale
            bar = Markup('<rect class="bar {}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
            parts.append(bar.format(style, column, top, max(width, 0.0), thick, title))
            column += width
    parts.append(_text((left + right) / 2, bottom + 34, x.label, "middle", "axis"))
    return _svg(name, bottom + 42, parts)


def nice_axis(label: str, values: Sequence[float], zero: bool = True, count: int = 5, binary: bool = False) -> Axis:
    """An axis over `values` with about `count` ticks at 1, 2, 2.5 or 5 times a power of ten (`binary`: at powers of two).

    It ends just past the largest value, or at the tick after it where that is near.
    """
    low, high = (0.0 if zero else min(values)), max(values)
    if high <= low:
        low, high = (0.0, high or 1.0) if zero else (low - 0.5, high + 0.5)
    raw = (high - low) / count
    if binary:
        step = 2.0 ** max(0, math.ceil(math.log2(raw) - 1e-9))
    else:
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if last * step - high > 0.4 * step:
        last -= 1
    ticks = tuple((index * step, tick_label(index * step, step)) for index in range(first, last + 1))
    return Axis(label, ticks, first * step, max(last * step, high))


def ordinal_axis(label: str, names: Sequence[str]) -> Axis:
    """One evenly spaced tick for each name, at 0, 1, 2, …"""
    return Axis(label, tuple((float(i), name) for i, name in enumerate(names)), -0.35, len(names) - 0.65)


def tick_label(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals and not math.isclose(step * 10**decimals, round(step * 10**decimals)):
        decimals += 1  # a step of 2.5 or 0.25
    return f"{value:,.{decimals}f}"


def swatch(style: str, shape: int | None = 0) -> Markup:
    """A legend's sample of a series."""
    mark = Markup('<line class="line" x1="1" x2="17" y1="7" y2="7" stroke-dasharray="5 4"/>')
    if shape is not None:
        mark = Markup(SHAPES[shape % len(SHAPES)].format(x=9, y=7))
    return Markup('<svg class="swatch {}" viewBox="0 0 18 14" aria-hidden="true">{}</svg>').format(style, mark)


def _frame(x: Axis, y: Axis, right: float, bottom: float, px, py) -> Markup:  # type: ignore[no-untyped-def]
    parts = [_text(4, 12, y.label, "start", "axis")]
    for value, label in y.ticks:
        row = py(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, row, row))
        parts.append(_text(LEFT - 7, row + 4, label, "end"))
    parts.append(Markup('<line class="base" x1="{}" x2="{:.1f}" y1="{}" y2="{}"/>').format(LEFT, right, bottom, bottom))
    last = -math.inf
    for value, label in x.ticks:
        half = len(label) * CHARACTER / 2
        if px(value) - half > last + 4:  # a label that would touch its neighbour is left out
            parts.append(_text(px(value), bottom + 17, label, "middle"))
            last = px(value) + half
    parts.append(_text((LEFT + right) / 2, bottom + 35, x.label, "middle", "axis"))
    return Markup("").join(parts)


def _marker(point: Point, shape: int | None, px, py) -> Markup:  # type: ignore[no-untyped-def]
    if shape is None:
        return Markup("")
    column = px(point.x)
    parts = [Markup("<title>{}</title>").format(point.title)]
    if point.low is not None and point.high is not None:
        low, high = py(point.low), py(point.high)
        whisker = "M{0:.1f} {1:.1f}V{2:.1f}M{3:.1f} {1:.1f}h6M{3:.1f} {2:.1f}h6".format(column, low, high, column - 3)
        parts.append(Markup('<path class="whisker" d="{}"/>').format(whisker))
    parts.append(Markup(SHAPES[shape % len(SHAPES)].format(x=column, y=py(point.y))))
    parts.append(Markup('<circle class="hit" cx="{:.1f}" cy="{:.1f}" r="12"/>').format(column, py(point.y)))
    return Markup('<g class="mark">{}</g>').format(Markup("").join(parts))


def _end_labels(ends: list[tuple[float, float, Series]], bottom: float) -> Markup:
    """A label right of each last point; labels that would overlap are pushed down, and up again from the bottom."""
    ordered = sorted(ends, key=lambda end: end[0])
    spans = [(column, column + 9 + len(s.label) * CHARACTER) for _, column, s in ordered]
    clash = [[a[0] < b[1] and b[0] < a[1] for b in spans] for a in spans]
    rows: list[float] = []
    for index, (row, _, _) in enumerate(ordered):
        rows.append(max([row, *(other + LABEL_PITCH for j, other in enumerate(rows) if clash[index][j])]))
    for index in reversed(range(len(rows))):
        below = (rows[j] - LABEL_PITCH for j in range(index + 1, len(rows)) if clash[index][j])
        rows[index] = min([rows[index], bottom, *below])
    text = Markup('<text class="label {}" x="{:.1f}" y="{:.1f}">{}</text>')
    return Markup("").join(
        text.format(s.style, column + 9, row + 4, s.label) for row, (_, column, s) in zip(rows, ordered, strict=True)
    )


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)


def _svg(name: str, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, escape(name))
    return head + Markup("").join(parts) + Markup("</svg>")
