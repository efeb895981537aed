"""Small charts as inline SVG: colours come from CSS variables, so one drawing serves light and dark, and needs no script.

A drawing is as wide as its place on the page: across it measures in per cent of the plot, down it in pixels, and its text keeps
the size of the page's on a phone and on a desk alike. Margins hold what stands beside the plot. Every text is escaped here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

HEIGHT = 236
LEFT, TOP, BOTTOM = 46, 26, 42
NARROW = 220  # pixels of a plot on a phone: labels that fit there fit anywhere
LABEL_PITCH = 14
CHARACTER = 6.6  # mean width of a character, in pixels
ROW_LABEL = 24  # characters of a bar's label; its parts' texts name it in full
SHAPES = (
    '<circle r="4"/>',
    '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>',
    '<path d="M0 -5.2l5.2 5.2l-5.2 5.2l-5.2 -5.2z"/>',
    '<path d="M0 -5l4.9 8.4h-9.8z"/>',
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
class Bar:
    """A row of a bar chart: what stands left of it, its parts as (CSS class, text a pointer shows, length), what ends it."""

    label: str
    parts: tuple[tuple[str, str, float], ...]
    end: str


@dataclass(frozen=True)
class Axis:
    """`ticks` are (position, label) pairs; `low` … `high` is what the axis spans."""

    label: str
    ticks: tuple[tuple[float, str], ...]
    low: float
    high: float

    def at(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def line_chart(name: str, series: Sequence[Series], x: Axis, y: Axis, direct_labels: bool = True) -> Markup:
    """Lines with markers and whiskers, labelled at their right ends. `name` says it all to a screen reader."""
    longest = max((len(s.label) for s in series), default=0) if direct_labels else 0
    bottom = HEIGHT - BOTTOM

    def py(value: float) -> float:
        return bottom - y.at(value) * (bottom - TOP)

    parts = [_frame(x, y, bottom, py)]
    for s in series:
        dashed = Markup(' stroke-dasharray="5 4" opacity="0.8"') if s.shape is None else ""
        line = Markup('<line class="line" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"{}/>')
        body = [
            line.format(_percent(x.at(a.x)), py(a.y), _percent(x.at(b.x)), py(b.y), dashed)
            for a, b in itertools.pairwise(s.points)
        ]
        body += [_marker(point, s.shape, x, py) for point in s.points if s.shape is not None]
        if s.shape is None and len(s.points) == 1:  # no line joins it to anything
            tick = Markup('<svg x="{}" y="{:.1f}" overflow="visible"><path class="line" d="M-8 0h16"/></svg>')
            body.append(tick.format(_percent(x.at(s.points[0].x)), py(s.points[0].y)))
        parts.append(Markup('<g class="{}">{}</g>').format(s.style, Markup("").join(body)))
    if direct_labels:
        parts.append(_end_labels([(py(s.points[-1].y), x.at(s.points[-1].x), s) for s in series if s.points], bottom))
    return _svg(name, HEIGHT, LEFT, longest * CHARACTER + 14 if longest else 12, parts)


def stacked_bars(name: str, bars: Sequence[Bar], x: Axis) -> Markup:
    """Horizontal bars, the first on top, each with its sum at its end."""
    pitch, thick = 28, 18
    left = min(ROW_LABEL, max(len(bar.label) for bar in bars)) * CHARACTER + 10
    bottom = 8 + pitch * len(bars)
    parts = []
    for at, label in x.ticks:
        column = _percent(x.at(at))
        parts.append(Markup('<line class="grid" x1="{0}" x2="{0}" y1="4" y2="{1}"/>').format(column, bottom))
        parts.append(_text(column, bottom + 16, label, "middle"))
    for index, bar in enumerate(bars):
        top = 8 + index * pitch
        short = bar.label if len(bar.label) <= ROW_LABEL else bar.label[: ROW_LABEL - 1] + "…"
        parts.append(_text("0", top + thick - 5, short, "end", dx=-8))
        end = 0.0
        for style, title, length in bar.parts:
            rectangle = Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
            width = max(0.0, length) / (x.high - x.low)
            parts.append(rectangle.format(style, _percent(end), top, _percent(width), thick, title))
            end += width
        parts.append(_text(_percent(end), top + thick - 5, bar.end, "start", "value", dx=7))
    parts.append(_text("50%", bottom + 34, x.label, "middle", "axis"))
    return _svg(name, bottom + 42, left, max(len(bar.end) for bar in bars) * CHARACTER + 12, parts)


def nice_axis(label: str, values: Sequence[float], zero: bool = True, count: int = 5, binary: bool = False) -> Axis:
    """An axis over `values` with about `count` ticks at 1, 2, 2.5 or 5 times a power of ten (`binary`: at powers of two).

    It ends just past the largest value, or at the tick after it where that is near.
    """
    low, high = (0.0 if zero else min(values)), max(values)
    if high <= low:
        margin = max(0.5, 1e-6 * abs(low))  # a large number and a half is the number itself
        low, high = (0.0, high or 1.0) if zero else (low - margin, high + margin)
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
    return Axis(label, tuple((float(i), name) for i, name in enumerate(names)), -0.25, len(names) - 0.85)


def tick_label(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals and not math.isclose(step * 10**decimals, round(step * 10**decimals)):
        decimals += 1  # a step of 2.5 or 0.25
    return f"{value:,.{decimals}f}"


def swatch(style: str, shape: int | None = 0) -> Markup:
    """A legend's sample of a series."""
    mark = Markup('<line class="line" x1="-8" x2="8" y1="0" y2="0" stroke-dasharray="5 4"/>')
    if shape is not None:
        mark = Markup(SHAPES[shape % len(SHAPES)])
    return Markup('<svg class="swatch {}" viewBox="-9 -7 18 14" aria-hidden="true">{}</svg>').format(style, mark)


def _frame(x: Axis, y: Axis, bottom: float, py: Callable[[float], float]) -> Markup:
    parts = [_text("0", 12, y.label, "start", "axis", dx=4 - LEFT)]
    for value, label in y.ticks:
        row = py(value)
        parts.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(row))
        parts.append(_text("0", row + 4, label, "end", dx=-7))
    parts.append(Markup('<line class="base" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(bottom))
    last = -math.inf
    for value, label in x.ticks:
        half = len(label) * CHARACTER / 2
        if x.at(value) * NARROW - half > last + 4:  # a label that would touch its neighbour is left out
            parts.append(_text(_percent(x.at(value)), bottom + 17, label, "middle"))
            last = x.at(value) * NARROW + half
    parts.append(_text("50%", bottom + 35, x.label, "middle", "axis"))
    return Markup("").join(parts)


def _marker(point: Point, shape: int | None, x: Axis, py: Callable[[float], float]) -> Markup:
    """A drawing of its own around the point, which is its origin: a path cannot be placed in per cent."""
    parts = [Markup("<title>{}</title>").format(point.title)]
    if point.low is not None and point.high is not None:
        low, high = py(point.low) - py(point.y), py(point.high) - py(point.y)
        parts.append(Markup('<path class="whisker" d="M0 {0:.1f}V{1:.1f}M-3 {0:.1f}h6M-3 {1:.1f}h6"/>').format(low, high))
    parts.append(Markup(SHAPES[(shape or 0) % len(SHAPES)] + '<circle class="hit" r="12"/>'))
    mark = Markup('<svg class="mark" x="{}" y="{:.1f}" overflow="visible">{}</svg>')
    return mark.format(_percent(x.at(point.x)), py(point.y), Markup("").join(parts))


def _end_labels(ends: list[tuple[float, float, Series]], bottom: float) -> Markup:
    """A label right of each last point (row in pixels, column in 0 … 1); labels that would overlap on the narrowest page are
    pushed down, and up again from the bottom or from the label of a dashed line, which is nothing without its place."""
    ordered = sorted(ends, key=lambda end: end[0])
    spans = [(column * NARROW - 6, column * NARROW + 9 + len(s.label) * CHARACTER) for _, column, s in ordered]
    clash = [[a[0] < b[1] and b[0] < a[1] for b in spans] for a in spans]
    rows: list[float] = []
    for index, (row, _, s) in enumerate(ordered):
        above = () if s.shape is None else (o + LABEL_PITCH for j, o in enumerate(rows) if clash[index][j])
        rows.append(max([row, *above]))
    for index in reversed(range(len(rows))):
        below = (rows[j] - LABEL_PITCH for j in range(index + 1, len(rows)) if clash[index][j])
        rows[index] = min([rows[index], bottom, *below])
    return Markup("").join(
        _text(_percent(column), row + 4, s.label, "start", f"label {s.style}", dx=10)
        for row, (_, column, s) in zip(rows, ordered, strict=True)
    )


def _text(x: str, y: float, text: str, anchor: str, style: str = "tick", dx: float = 0) -> Markup:
    shift = Markup(' dx="{:g}"').format(dx) if dx else ""
    return Markup('<text class="{}" x="{}"{} y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, shift, y, anchor, text)


def _percent(part: float) -> str:
    return f"{100 * part:.2f}%"


def _svg(name: str, height: float, left: float, right: float, parts: Sequence[Markup]) -> Markup:
    place = f"height:{height:g}px;margin-left:{left:.0f}px;width:calc(100% - {left + right:.0f}px)"
    head = Markup('<svg class="chart" style="{}" role="img" aria-label="{}">').format(place, escape(name))
    return head + Markup("").join(parts) + Markup("</svg>")
