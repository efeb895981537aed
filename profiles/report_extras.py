"""The report's other figures: KV memory, quality, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from exporter.convert.methods import REPETITION
from exporter.units import size
from profiles.report_data import Row, group_labels, grouped, name_and_unit, place_label
from profiles.report_figures import KV_HEADS, Figure, Styles, Table
from profiles.report_svg import Bar, Point, Series, line_chart, nice_axis, ordinal_axis, stacked_bars, swatch
from profiles.results import BREAKDOWN_CLASSES, Subject
from profiles.units import milliseconds

ORIGINAL = "original"
EXACT = (ORIGINAL, REPETITION)  # nothing is lost: points of every method's line
SLOWEST = 12  # layers of an engine that the page names
CLASS_NAMES = {"attention": "attention", "matmul": "weight matmuls", "other": "other kernels", "runtime": "between kernels"}


def kv_memory(rows: Sequence[Row], styles: Styles) -> Figure:
    """KV bytes a token, and the bytes that one step reads at the longest context, by KV heads."""
    unique = {(row.groups, row.subject.dtype, row.subject.model): row for row in rows}
    subjects = sorted((row.subject for row in unique.values()), key=lambda s: (s.mean_groups, s.dtype, s.model))
    several = len({(s.dtype, s.model) for s in subjects}) > 1
    names = {id(s): f"G = {s.groups_label}" + (f" {s.dtype}" if several else "") for s in subjects}
    context = max(row.cell.context for row in rows)

    def chart(name: str, what: str, *pieces: tuple[str, Callable[[Subject], int]]) -> Markup:
        sums = {id(s): sum(count(s) for _, count in pieces) for s in subjects}
        scale, unit = _unit(max(sums.values()))
        bars = []
        for s in subjects:
            parts = [
                (
                    styles.of_groups(s.groups_label)[0] if part == "KV cache" else "weights",
                    f"{part}: {size(count(s))}",
                    count(s),
                )
                for part, count in pieces
            ]
            scaled = tuple((style, text, length / scale) for style, text, length in parts)
            bars.append(Bar(names[id(s)], scaled, size(sums[id(s)])))
        return stacked_bars(name, bars, nice_axis(f"{unit} {what}", [value / scale for value in sums.values()]))

    one = chart("KV bytes of one token", "for each token", ("KV cache", lambda s: s.kv_bytes_per_token))
    step = chart(
        *("Bytes of a step", "read by one step", ("weights", lambda s: s.weight_bytes)),
        ("KV cache", lambda s: s.kv_bytes_per_token * context),
    )
    panels = (("KV cache of one token", one), (f"A step at {context:,} tokens: weights (grey) and KV cache", step))
    table = tuple(
        (
            *(s.groups_label, str(s.heads), s.dtype, size(s.kv_bytes_per_token)),
            *(size(s.kv_bytes_per_token * context), size(s.weight_bytes), s.model),
        )
        for s in subjects
    )
    headings = (KV_HEADS, "query heads", "dtype", "KV a token", f"KV at {context:,} tokens", "weights read", "model")
    words = "A cache grows with the KV heads, the context and the batch; one sequence is shown."
    return Figure("kv", "KV memory", words, panels, Table(headings, table))


def quality(rows: Sequence[Row], styles: Styles) -> Figure | None:
    """Every quality figure against KV heads, and the first against decode latency at the longest context."""
    rows = [row for row in rows if row.quality]
    unique = list({(r.groups, method(r), r.subject.dtype, str(r.quality)): r for r in rows}.values())
    if not rows:
        return None
    unique.sort(key=lambda row: row.subject.mean_groups)
    names = group_labels(rows)
    panels = []
    methods = sorted({method(row) for row in unique} - {*EXACT}) or [ORIGINAL]  # each one's line starts at the original
    metrics = list(dict.fromkeys(name for row in rows for name in row.quality))
    for metric in metrics[:4]:
        lines = []
        measured = [row for row in unique if metric in row.quality]
        for index, label in enumerate(methods):
            points = [
                Point(names.index(row.groups), row.quality[metric], f"{method(row)}, {_value(row, metric)}")
                for row in measured
                if method(row) in (label, *EXACT)
            ]
            lines.append(Series(label, f"s{(index + 4) % 8}", tuple(points), index))
        name, unit = name_and_unit(metric)
        y = nice_axis(unit or name, [point.y for line in lines for point in line.points], zero=False)
        heading = f"{name[:1].upper()}{name[1:]} by KV heads"
        panels.append((heading, line_chart(heading, lines, ordinal_axis(KV_HEADS, names), y)))
    if trade := _trade_off(rows, metrics[0], styles):
        panels.append(trade)
    table = tuple((r.groups, method(r), r.subject.dtype, *(_value(r, m) for m in metrics)) for r in unique)
    words = "What fewer KV heads cost, measured on the same weights that were timed."
    return Figure("quality", "Quality", words, tuple(panels), Table((KV_HEADS, "conversion", "dtype", *metrics), table))


def where_time_goes(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds of one decode step by class of kernel, a panel for each context and batch."""
    rows = [row for row in rows if row.breakdown]
    if not rows:
        return None
    panels = []
    for place, part in grouped(rows, lambda row: row.place).items():
        bars = []
        for row in part:
            pieces = [(kind, row.breakdown.get(kind, 0.0)) for kind in BREAKDOWN_CLASSES]
            parts = tuple((f"b-{kind}", f"{CLASS_NAMES[kind]}: {milliseconds(s)} ms", s * 1e3) for kind, s in pieces)
            total = f"{milliseconds(sum(row.breakdown.values()))} ms"
            bars.append(Bar(f"{row.series}, G = {row.groups}", parts, total))
        x = nice_axis("ms a step, profiled", [sum(row.breakdown.values()) * 1e3 for row in part])
        heading = place_label(place, rows)
        panels.append((heading, stacked_bars(f"Where the time goes, {heading}", bars, x)))
    table = tuple(
        (
            *(row.groups, row.series, str(row.cell.batch), f"{row.cell.context:,}"),
            *(milliseconds(row.breakdown.get(kind, 0.0)) for kind in BREAKDOWN_CLASSES),
        )
        for row in rows
    )
    headings = (KV_HEADS, "series", "batch", "context", *(f"{CLASS_NAMES[kind]} ms" for kind in BREAKDOWN_CLASSES))
    words = "From a run of its own with the runtime's profiler on, which slows every kernel a little: read the shares."
    legend = tuple((swatch(f"b-{kind}", 1), CLASS_NAMES[kind]) for kind in BREAKDOWN_CLASSES)
    return Figure("breakdown", "Where the time goes", words, tuple(panels), Table(headings, table), legend)


def slowest_layers(rows: Sequence[Row]) -> Figure | None:
    """Of TensorRT engines, the layers that take the most of a decode step."""
    rows = [row for row in rows if row.cell.layers]
    if not rows:
        return None
    table = []
    for row in rows:
        layers = row.cell.layers or {}
        whole = sum(layers.values())
        for name, seconds in sorted(layers.items(), key=lambda item: -item[1])[:SLOWEST]:
            place = (row.groups, row.series, str(row.cell.batch), f"{row.cell.context:,}")
            table.append((*place, name, milliseconds(seconds), f"{seconds / whole:.1%}" if whole else ""))
    headings = (KV_HEADS, "series", "batch", "context", "layer", "ms", "share of all layers")
    words = f"The {SLOWEST} slowest layers of each TensorRT engine, by its own profiler; the results file has all."
    return Figure("layers", "Slowest layers", words, (), Table(headings, tuple(table)))


def method(row: Row) -> str:
    """How the variant's KV heads came about."""
    conversion = row.subject.conversion
    return str(conversion.get("method", "converted")) if conversion else ORIGINAL


def _trade_off(rows: Sequence[Row], metric: str, styles: Styles) -> tuple[str, Markup] | None:
    """The fastest decode of each KV-head count at the longest context against `metric`."""
    decode = [row for row in rows if row.cell.kind == "decode" and metric in row.quality]
    if not decode:
        return None
    batch, context = min(r.cell.batch for r in decode), max(r.cell.context for r in decode)
    at = [row for row in decode if row.place == (batch, context)]
    fastest = [min(part, key=lambda row: row.times.p50) for part in grouped(at, lambda row: row.groups).values()]
    if len(fastest) < 2:
        return None
    lines = []
    for row in fastest:
        style, shape = styles.of_groups(row.groups)
        text = f"G = {row.groups}, {row.series}: {milliseconds(row.times.p50)} ms, {_value(row, metric)}"
        point = Point(row.times.p50 * 1e3, row.quality[metric], text)
        lines.append(Series(f"G = {row.groups}", style, (point,), shape))
    x = nice_axis(f"ms a step at {context:,} tokens", [line.points[0].x for line in lines])
    name, unit = name_and_unit(metric)
    y = nice_axis(unit or name, [line.points[0].y for line in lines], zero=False)
    heading = f"{name[:1].upper()}{name[1:]} against latency"
    return f"{heading} (fastest series)", line_chart(heading, lines, x, y)


def _value(row: Row, metric: str) -> str:
    value = row.quality.get(metric)
    return "" if value is None else f"{value:.4g}"


def _unit(largest: float) -> tuple[float, str]:
    return next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= s), (1.0, "bytes"))
