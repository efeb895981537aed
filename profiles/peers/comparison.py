"""The comparison of what was measured: rows, and tables in Markdown.

A runtime's time is the median of its samples. Ratios are to the fastest of headpool's patterns at that place; `own` and `best`
say whether a row is one of them, and the fastest. Where memory did not hold all at once, headpool was measured with each of the
others: a ratio is of what took turns, and headpool's own line of a table is the last of its several. The floor is of memory
alone: a read of the weights and the KV cache, as headpool stores them, which took turns with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from profiles import stats
from profiles.reading import by_reads
from profiles.report_data import grouped
from profiles.results import Cell, Results

Row = dict[str, Any]
OWN = "onnxruntime"  # the backend of headpool's cells


def name_of(cell: Cell) -> str:
    """As a line of a table has it."""
    return f"headpool `{cell.subject.pattern}`" if cell.backend == OWN else cell.subject.pattern


def weights_of(cell: Cell) -> str:
    """ "fp32", "int4"."""
    return cell.subject.dtype.removesuffix(" weights").split(", ")[-1]


def rows_of(results: Results) -> list[Row]:
    """A row a cell of decoding and first tokens: milliseconds, the floor's, the ratio to headpool's fastest, intervals."""
    rows = []
    cells = by_reads(cell for cell in results.cells if cell.kind != "prefill")
    for place in grouped(cells, lambda cell: (weights_of(cell), cell.kind, cell.cohort, cell.context)).values():
        best = min((cell for cell in place if cell.backend == OWN), key=_median, default=None)
        rows += [_row(cell, best) for cell in place]
    return rows


def _row(cell: Cell, best: Cell | None) -> Row:
    low, high = stats.median_interval(cell.samples, block=cell.burst)
    row: Row = {
        "what": cell.kind,
        "weights": weights_of(cell),
        "groups": cell.subject.groups,
        "batch": cell.batch,
        "context": cell.context,
        "runtime": name_of(cell),
        "ms": _median(cell) * 1e3,
        "low_ms": low * 1e3,
        "high_ms": high * 1e3,
        "floor_ms": cell.floor * 1e3 if cell.floor else None,
    }
    if cell.floor:  # what 1,000 tokens more add to it
        more = 1000 * cell.batch * cell.subject.kv_bytes_per_token
        row |= {"floor_slope_ms": row["floor_ms"] * more / (cell.subject.weight_bytes + cell.kv_bytes)}
    if best:
        low, high = stats.ratio_interval(cell.samples, best.samples, block=max(cell.burst, best.burst))
        enough = min(len(cell.samples), len(best.samples)) >= stats.ENOUGH
        row |= {"to_headpool": row["ms"] / (_median(best) * 1e3)}
        row |= {"low": low if enough else None, "high": high if enough else None}
    return row


def slopes_of(rows: Iterable[Row]) -> list[Row]:
    """Milliseconds that 1,000 more tokens of context cost, and what they cost the floor; none with one context only."""
    found = []
    for line in grouped(_decode(rows), lambda row: (row["weights"], row["groups"], row["runtime"])).values():
        contexts = [row["context"] for row in line]
        value = stats.slope(contexts, [row["ms"] / 1e3 for row in line])
        if value is not None:
            floor = stats.median([row["floor_slope_ms"] for row in line])
            found.append({key: line[0][key] for key in ("weights", "groups", "runtime")} | {"ms": value, "floor_ms": floor})
    return found


def tables(rows: Sequence[Row], differences: Sequence[Row], missing: Sequence[Row]) -> str:
    """Markdown: a table each kind of weights, a line a runtime, its columns a context with one figure a number of KV heads.

    differences  rows of {runtime, weights, groups, difference}, see agreement.py
    missing      rows of {runtime, weights, reason}
    """
    parts = [_table(weights, part, differences) for weights, part in grouped(rows, lambda row: row["weights"]).items()]
    parts += ["\n".join(f"{row['runtime']}, {row['weights']}: left out, {row['reason']}" for row in missing)] if missing else []
    return "\n\n".join(parts) + "\n"


def _table(weights: str, rows: list[Row], differences: Sequence[Row]) -> str:
    groups = sorted({row["groups"] for row in rows}, reverse=True)
    heads = " / ".join(map(str, groups))
    contexts = sorted({row["context"] for row in _decode(rows)})
    prompts = sorted({row["context"] for row in rows if row["what"] == "ttft"})
    slopes = grouped(slopes_of(rows), lambda row: row["runtime"])
    far = grouped([row for row in differences if row["weights"] == weights], lambda row: row["runtime"])
    titles = [f"{weights} weights, batch {rows[0]['batch']}, G = {heads}"]
    titles += [f"{context:,} tokens, ms | × headpool's best" for context in contexts]
    titles += ["ms per 1,000 more tokens"] if slopes else []
    titles += [f"first token of {prompt:,}, ms | × headpool's best" for prompt in prompts]
    titles += ["logits off by"]
    lines = [" | ".join(titles)]
    lines += [" | ".join(["---"] * (lines[0].count("|") + 1))]

    def figures(part: Sequence[Row], key: str, form: Callable[[float], str]) -> str:
        by = {row["groups"]: row[key] for row in part if row.get(key) is not None}
        return " / ".join(form(by[g]) if g in by else "–" for g in groups)

    def line(name: str, part: Sequence[Row], steps: Sequence[Row], key: str) -> list[str]:
        found = [name]
        for kind, places in (("decode", contexts), ("slope", [0]), ("ttft", prompts)):
            for place in places:
                if kind == "slope":
                    found += [figures(steps, key, "{:.2f}".format)] if slopes else []
                    continue
                here = [row for row in part if row["what"] == kind and row["context"] == place]
                form = "{:.1f}".format if kind == "decode" else "{:,.0f}".format
                found += [figures(here, key, form), "" if key == "floor_ms" else figures(here, "to_headpool", "{:.2f}".format)]
        return found

    first = rows[0]["runtime"]
    lines += [" | ".join([*line("floor", [r for r in rows if r["runtime"] == first], slopes.get(first, []), "floor_ms"), ""])]
    for name, part in grouped(rows, lambda row: row["runtime"]).items():
        off = figures(far.get(name.replace("`", ""), []), "difference", "{:.2g}".format)
        lines.append(" | ".join([*line(name, part, slopes.get(name, []), "ms"), off]))
    return "\n".join(f"| {text} |" for text in lines)


def _decode(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["what"] == "decode"]


def _median(cell: Cell) -> float:
    return stats.median(cell.samples)
