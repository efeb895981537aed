"""The report's headline in plain words, computed from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from profiles import stats
from profiles.report_data import Row, grouped, size
from profiles.results import Results
from profiles.table import milliseconds

BUSY = 0.8  # typical bandwidth over the best, below which a run is called disturbed


@dataclass(frozen=True)
class Tile:
    value: str
    what: str


@dataclass(frozen=True)
class Headline:
    """The cells the headline speaks of: decode at the smallest batch and longest context.

    `few` is the fastest cell with the fewest KV heads, `many` the cell of the same series with the most; `fastest` is the
    fastest of each KV-head count.
    """

    few: Row
    many: Row
    fastest: tuple[Row, ...]
    at: tuple[Row, ...]


def headline(rows: Sequence[Row]) -> Headline | None:
    """None without decode cells. Only the first model's cells are looked at."""
    decode = [row for row in rows if row.cell.kind == "decode"]
    decode = [row for row in decode if row.subject.model == decode[0].subject.model]
    if not decode:
        return None
    batch = min(row.cell.batch for row in decode)
    context = max(row.cell.context for row in decode if row.cell.batch == batch)
    at = [row for row in decode if row.place == (batch, context)]
    fastest = [min(part, key=lambda row: row.times.p50) for part in grouped(at, lambda row: row.groups).values()]
    fastest.sort(key=lambda row: row.subject.mean_groups)
    few = fastest[0]
    many = max((row for row in at if row.series == few.series), key=lambda row: row.subject.mean_groups)
    return Headline(few, many, tuple(fastest), tuple(at))


def tiles(rows: Sequence[Row]) -> list[Tile]:
    """Three to five figures to be read first."""
    found = headline(rows)
    if found is None:
        return [Tile(str(len(rows)), "cells measured; none of decode")]
    few, many, context = found.few, found.many, found.few.cell.context
    each = f"a token at {context:,} tokens of context with {_heads(few)}"
    result = [Tile(f"{milliseconds(few.times.p50)} ms", f"{each} ({few.series})")]
    if few is not many:
        speed, less = many.times.p50 / few.times.p50, _kv_ratio(few, many)
        result.append(Tile(f"{speed:.2f}×", f"as fast as with {_heads(many)}"))
        result.append(Tile(f"{less:.3g}×", f"less KV memory: {size(few.subject.kv_bytes_per_token)} for each token"))
    if few.ratio:
        result.append(Tile(f"{few.ratio:.2f}×", "the floor that memory bandwidth sets for it"))
    if (change := _quality_change(few, many)) is not None:
        metric, before, after = change
        result.append(Tile(f"{after - before:+.3g}", f"{metric}, {before:.3g} to {after:.3g}"))
    return result


def sentences(rows: Sequence[Row], results: Sequence[Results]) -> list[str]:
    """What the figures say, and whether the machine was quiet enough to say it."""
    found = headline(rows)
    if found is None:
        return ["No decode step was measured.", *_noise(results)]
    return [*_speed(found), *_patterns(found), *_floor(found), *_slopes(rows, found), *_loss(found), *_noise(results)]


def _noise(results: Sequence[Results]) -> list[str]:
    """A warning for each run whose memory bandwidth was often far below its best: something else was using the machine."""
    texts = []
    for index, result in enumerate(results):
        if result.bandwidth and (typical := stats.median(result.bandwidth.samples)) < BUSY * result.bandwidth.best:
            share, which = typical / result.bandwidth.best, f"In run {index + 1} the" if len(results) > 1 else "The"
            texts.append(
                f"{which} machine was busy with other work: its bandwidth was typically {share:.0%} of its best. Measure again."
            )
    return texts


def _speed(found: Headline) -> list[str]:
    few, many = found.few, found.many
    where = f"at {few.cell.context:,} tokens of context" + (f" and batch {few.cell.batch}" if few.cell.batch > 1 else "")
    if few is many:
        return [f"With {_heads(few)} a decode step takes {milliseconds(few.times.p50)} ms {where} ({few.series})."]
    low, high = stats.ratio_interval(many.cell.samples, few.cell.samples, block=max(few.cell.burst, many.cell.burst))
    return [
        f"Going from {_heads(many)} to {_heads(few)} takes a decode step {where} from {milliseconds(many.times.p50)} ms to "
        f"{milliseconds(few.times.p50)} ms ({few.series}): {many.times.p50 / few.times.p50:.2f} times as fast, "
        f"95 % interval {low:.2f} to {high:.2f}{', so it may be no change at all' if low <= 1 <= high else ''}.",
        f"Its KV cache takes {size(few.subject.kv_bytes_per_token)} a token rather than "
        f"{size(many.subject.kv_bytes_per_token)}: {size(few.cell.kv_bytes)} rather than {size(many.cell.kv_bytes)} {where}.",
    ]


def _patterns(found: Headline) -> list[str]:
    rivals = [row for row in found.at if row.groups == found.few.groups and row is not found.few]
    if not rivals:
        return []
    texts = [f"{row.series} takes {row.times.p50 / found.few.times.p50:.2f} times as long" for row in rivals]
    return [f"With {_heads(found.few)}, {found.few.series} is the fastest; {', '.join(texts)}."]


def _floor(found: Headline) -> list[str]:
    ratios = [row for row in found.fastest if row.ratio]
    if not ratios:
        return []
    low, high = (pick(row.ratio or 0 for row in ratios) for pick in (min, max))
    span = f"{low:.2f} times" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} times"
    return [f"The fastest graph of each KV-head count takes {span} what reading its weights and KV cache once must take."]


def _slopes(rows: Sequence[Row], found: Headline) -> list[str]:
    texts = []
    for end in dict.fromkeys((found.few.groups, found.many.groups)):
        line = [r for r in rows if r.cell.kind == "decode" and r.series == found.few.series and r.groups == end]
        line = [row for row in line if row.cell.batch == found.few.cell.batch]
        slope = stats.slope([row.cell.context for row in line], [row.times.p50 for row in line])
        if slope is not None:
            texts.append(
                f"{slope:.3f} ms with {_heads(line[0])}" if slope > 0 else f"nothing measurable with {_heads(line[0])}"
            )
    return [f"Each further 1,000 tokens of context cost {' and '.join(texts)} ({found.few.series})."] if texts else []


def _loss(found: Headline) -> list[str]:
    change = _quality_change(found.few, found.many)
    if change is None:
        return []
    metric, before, after = change
    return [f"What it cost: {metric} goes from {before:.3g} to {after:.3g}."]


def _quality_change(few: Row, many: Row) -> tuple[str, float, float] | None:
    shared = [name for name in few.quality if name in many.quality]
    return (shared[0], many.quality[shared[0]], few.quality[shared[0]]) if shared and few is not many else None


def _kv_ratio(few: Row, many: Row) -> float:
    return many.subject.kv_bytes_per_token / max(1, few.subject.kv_bytes_per_token)


def _heads(row: Row) -> str:
    return "1 KV head" if row.groups == "1" else f"{row.groups} KV heads"
