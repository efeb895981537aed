"""The report's headline in plain words, computed from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.units import size
from profiles import stats
from profiles.report_data import Row, grouped, name_and_unit, slope_of
from profiles.units import milliseconds


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


def headlines(rows: Sequence[Row]) -> dict[str, Headline]:
    """By model, in the order of the rows; empty without decode cells."""
    decode = [row for row in rows if row.cell.kind == "decode"]
    return {model: _headline(part) for model, part in grouped(decode, lambda row: row.subject.model).items()}


def _headline(decode: Sequence[Row]) -> Headline:
    batch = min(row.cell.batch for row in decode)
    context = max(row.cell.context for row in decode if row.cell.batch == batch)
    at = [row for row in decode if row.place == (batch, context)]
    fastest = [min(part, key=lambda row: row.times.p50) for part in grouped(at, lambda row: row.groups).values()]
    fastest.sort(key=lambda row: row.subject.mean_groups)
    few = fastest[0]
    many = max((row for row in at if row.series == few.series), key=lambda row: row.subject.mean_groups)
    return Headline(few, many, tuple(fastest), tuple(at))


def tiles(rows: Sequence[Row]) -> list[Tile]:
    """Three to five figures to be read first; with several models one of each, for they are not compared."""
    models = headlines(rows)
    if not models:
        return [Tile(str(len(rows)), "cells measured; none of decode")]
    return [tile for found in models.values() for tile in _tiles(found)[: 1 if len(models) > 1 else None]]


def _tiles(found: Headline) -> list[Tile]:
    few, many, context = found.few, found.many, found.few.cell.context
    each = f"a token at {context:,} tokens of context with {_heads(few)}"
    result = [Tile(f"{milliseconds(few.times.p50)} ms", f"{each} ({few.series})")]
    if few is not many:
        speed, less = many.times.p50 / few.times.p50, _kv_ratio(few, many)
        sure = ", measured apart" if _apart(many, few) else ""
        sure += "" if _differ(many, few) else ": no measurable difference"
        result.append(Tile(f"{speed:.2f}×", f"as fast as with {_heads(many)}{sure}"))
        result.append(Tile(f"{less:.3g}×", f"less KV memory: {size(few.subject.kv_bytes_per_token)} for each token"))
    if few.ratio:
        result.append(Tile(f"{few.ratio:.2f}×", "the floor that memory bandwidth sets for it"))
    if (change := _quality_change(few, many)) is not None:
        metric, *values = change
        name, unit = name_and_unit(metric)
        before, after, difference = _with_difference(*values)
        result.append(Tile(difference, f"{f'{unit} of ' if unit else ''}{name}: {before} to {after}"))
    return result


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the figures say; where there are several models, each sentence begins with its own."""
    models = headlines(rows)
    if not models:
        return ["No decode step was measured."]
    texts = []
    for model, found in models.items():
        own = [row for row in rows if row.subject.model == model]
        said = [*_speed(found), *_patterns(found), *_floor(found), *_slopes(own, found), *_loss(found)]
        if found.few.subject.encoder:
            said.append("It is an encoder-decoder: its context is the tokens that the encoder reads.")
        texts += [f"{model}: {text}" for text in said] if len(models) > 1 else said
    return texts


def _speed(found: Headline) -> list[str]:
    few, many = found.few, found.many
    where = _where(found)
    if few is many:
        return [f"With {_heads(few)} a decode step takes {milliseconds(few.times.p50)} ms {where} ({few.series})."]
    low, high = _ratio_interval(many, few)
    interval = f"95 % interval {low:.2f} to {high:.2f}" if high < math.inf else "too few samples to say how sure that is"
    interval += ", so it may be no change at all" if low <= 1 <= high < math.inf else ""
    apart = " The two were not measured in turns, so a drift of the machine may be part of it." if _apart(many, few) else ""
    return [
        f"Going from {_heads(many)} to {_heads(few)} takes a decode step {where} from {milliseconds(many.times.p50)} ms to "
        f"{milliseconds(few.times.p50)} ms ({few.series}): {many.times.p50 / few.times.p50:.2f} times as fast, "
        f"{interval}.{apart}",
        f"Its KV cache takes {size(few.subject.kv_bytes_per_token)} a token rather than "
        f"{size(many.subject.kv_bytes_per_token)}: {size(few.cell.kv_bytes)} rather than {size(many.cell.kv_bytes)} {where}.",
    ]


def _patterns(found: Headline) -> list[str]:
    rivals = [row for row in found.at if row.groups == found.few.groups and row is not found.few]
    if not rivals:
        return []
    slower = [row for row in rivals if _differ(row, found.few)]
    texts = [f"{row.series} takes {row.times.p50 / found.few.times.p50:.2f} times as long" for row in slower]
    texts += [f"{row.series} is as fast within the noise" for row in rivals if row not in slower]
    if any(_apart(row, found.few) for row in rivals):
        texts.append("not all of them were measured in turns, so a drift of the machine may be part of it")
    return [f"With {_heads(found.few)}, {found.few.series} has the lowest median {_where(found)}; {', '.join(texts)}."]


def _floor(found: Headline) -> list[str]:
    ratios = [row for row in found.fastest if row.ratio]
    if not ratios:
        return []
    low, high = (pick(row.ratio or 0 for row in ratios) for pick in (min, max))
    span = f"{low:.2f} times" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} times"
    return [f"The fastest graph of each KV-head count takes {span} what reading its weights and KV cache once must take."]


def _slopes(rows: Sequence[Row], found: Headline) -> list[str]:
    """What context costs with few and with many KV heads, as far as the samples can tell."""
    slopes, texts = [], []
    for end in dict.fromkeys((found.few.groups, found.many.groups)):
        line = [r for r in rows if r.cell.kind == "decode" and r.series == found.few.series and r.groups == end]
        line = [row for row in line if row.cell.batch == found.few.cell.batch]
        slope = slope_of(line)
        if slope is not None:
            slopes.append(slope)
            cost = f"{slope.text} ms" if slope.sure else "nothing measurable"
            least = f", {slope.ratio} times the least it can" if slope.ratio else ""
            texts.append(f"{cost} with {_heads(line[0])}{least}")
    if not slopes:
        return []
    if not any(slope.sure for slope in slopes):
        return [f"More context cost nothing measurable ({found.few.series})."]
    same = ""
    if len(slopes) == 2:
        low, high = stats.interval(slopes[1].draws - slopes[0].draws)
        same = ", a difference within the noise" if low <= 0 <= high else ""
    return [f"Each further 1,000 tokens of context cost {' and '.join(texts)} ({found.few.series}){same}."]


def _loss(found: Headline) -> list[str]:
    change = _quality_change(found.few, found.many)
    if change is None:
        return []
    metric, before, after = change
    name, unit = name_and_unit(metric)
    first, last, _ = _with_difference(before, after)
    return [f"Quality: {name} goes from {first} to {last}{f' {unit}' if unit else ''}."]


def _quality_change(few: Row, many: Row) -> tuple[str, float, float] | None:
    shared = [name for name in few.quality if name in many.quality]
    return (shared[0], many.quality[shared[0]], few.quality[shared[0]]) if shared and few is not many else None


def _with_difference(before: float, after: float) -> tuple[str, str, str]:
    """Both values, and what is added: with the decimals in which three digits of the difference show, six at most."""
    change = after - before
    decimals = min(6, max(0, 2 - math.floor(math.log10(abs(change))))) if change and math.isfinite(change) else 2
    before, after = round(before, decimals), round(after, decimals)
    return f"{before:.{decimals}f}", f"{after:.{decimals}f}", f"{after - before:+.{decimals}f}"


def _where(found: Headline) -> str:
    cell = found.few.cell
    return f"at {cell.context:,} tokens of context" + (f" and batch {cell.batch}" if cell.batch > 1 else "")


def _apart(one: Row, other: Row) -> bool:
    """Whether the two were not measured in turns, so that a drift of the machine does not cancel in their ratio."""
    return (one.run, one.cell.cohort) != (other.run, other.cell.cohort)


def _ratio_interval(above: Row, below: Row) -> tuple[float, float]:
    block = max(above.cell.burst, below.cell.burst)
    return stats.ratio_interval(above.cell.samples, below.cell.samples, block=block)


def _differ(one: Row, other: Row) -> bool:
    """Whether the 95 % interval of the ratio of their medians excludes 1."""
    low, high = _ratio_interval(one, other)
    return not low <= 1 <= high


def _kv_ratio(few: Row, many: Row) -> float:
    return many.subject.kv_bytes_per_token / max(1, few.subject.kv_bytes_per_token)


def _heads(row: Row) -> str:
    return "1 KV head" if row.groups == "1" else f"{row.groups} KV heads"
