"""The figures of README.md and profiles/results/README.md, written from the measured JSON, so that no number is typed.

    python -m profiles.benchmarks.readme [FOLDER]

FOLDER (default: profiles/results/xeon-2core) holds what the benchmarks and ./scripts/demo measured; other shapes and the
comparison of texts may lie in another machine's folder beside it, which the sentence then names. Only what stands between a
pair of marks, <!-- NAME:begin --> and <!-- NAME:end -->, is replaced.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.decode import decode
from exporter.files import replacing
from exporter.units import size
from graphs import patterns
from profiles import stats
from profiles.benchmarks.decoder import LIMITS
from profiles.machine import ROOT
from profiles.noise import busy
from profiles.reading import by_reads
from profiles.report_data import grouped, rows_of, slope_of
from profiles.results import Cell, Results
from profiles.units import milliseconds

FOLDER = ROOT / "profiles" / "results" / "xeon-2core"
LOSS = "cross-entropy, nats a token"
PEERS = ("peers", "peers-int4")  # the same model in other runtimes, by file; one kind of weights in each
SHAPES = {"peers-128": "Heads of 128", "peers-batch4": "A batch of 4"}  # other shapes than decoder.json's, by file
SLOPE = 1.5  # times its floor: the most that a further token of context may cost
INT4 = 4096, 1.5  # tokens of context, and how many times as fast as any other runtime with at most 4 KV heads
LATER = "not measured yet"
# What a pattern is, where the table names it first.
PATTERNS = {
    "fused": "`fused` (headpool's operators; static cache)",
    "grouped": "`grouped` (headpool's; static cache)",
    "attention": "`attention` (ONNX's operator; static)",
    "gqa": "`gqa` (ORT's fused operator; static)",
    "repeat": "`repeat` (the usual export; concat)",
}


def texts(folder: Path) -> dict[Path, dict[str, str]]:
    """What belongs between which marks of which page."""
    decoder, run, where = _decoder(folder)
    pages = {ROOT / "README.md": {"results": results(folder), "limit": limit(decoder)}}
    compared = "tokens and logits" if "largest_logit_difference" in _read(folder / "parity.json")["rows"][0] else "tokens"
    measured = {"decoder": f"{targets(decoder)}; {slopes(decoder, run)}{where}", "parity": f"greedy {compared}"}
    measured |= {name: shape(folder, name) or LATER for name in SHAPES}
    measured |= {"peers-int4": int4(folder) or LATER, "text": generated(folder) or LATER}
    return {**pages, ROOT / "profiles" / "results" / "README.md": measured}


def replace(text: str, marks: dict[str, str]) -> str:
    """`text` with each marked part made anew; every pair of marks must be there once."""
    for name, new in marks.items():
        pattern = rf"(?<=<!-- {name}:begin -->).*?(?=<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"{count} parts are marked {name}"
    return text


def results(folder: Path) -> str:
    """The README's first screen: the real model's table, and what the benchmarks found."""
    run = Results.load(folder / "smollm2.json")
    grouped = [cell.subject for cell in run.cells if cell.subject.conversion and cell.subject.groups == 1]
    method = (grouped[0].conversion or {}).get("method", "mean")
    warning = f"\n\n**{text}**" if (text := busy(run)) else ""
    title = f"**SmolLM2-135M-Instruct on {run.machine.cores} CPU cores** (its Q4_1 weights as fp32)"
    words = (
        f"{title}, ms a token (p50) by KV heads, as `./scripts/demo` measured it.\nG = 3 is the model as it was trained, 9 the "
        f"same model as multi-head attention (exact), 1 its heads pooled by `{method}` and not trained after."
    )
    return f"\n{words}{warning}\n\n{table(run)}\n\n{_benchmarks(folder, run)}\n"


def table(run: Results) -> str:
    """Markdown: decode p50 of each pattern at the two longest contexts, KV bytes and cross-entropy, by KV heads."""
    decode_cells = [cell for cell in run.cells if cell.kind == "decode" and cell.batch == 1]
    counts = sorted({cell.subject.groups for cell in decode_cells if isinstance(cell.subject.groups, int)}, reverse=True)
    contexts = sorted({cell.context for cell in decode_cells})[-2:]
    patterns = [name for name in PATTERNS if name in {cell.subject.pattern for cell in decode_cells}]
    cells = {(c.subject.pattern, c.context, c.subject.groups): c for c in decode_cells}
    lines = [["pattern", "context", *(f"G = {count}" for count in counts), f"G = {counts[0]} → {counts[-1]}"]]
    lines += [["---"] * len(lines[0])]
    for context in contexts:
        for pattern in patterns:
            times = [stats.median(cells[pattern, context, count].samples) for count in counts]
            name = PATTERNS[pattern] if context == contexts[0] else f"`{pattern}`"
            ratio = f"{times[0] / times[-1]:.2f} ×" + (" as fast" if len(lines) == 2 else "")
            if len({cells[pattern, context, count].cohort for count in (counts[0], counts[-1])}) > 1:
                ratio += ", measured apart"
            lines.append([name, f"{context:,}", *map(milliseconds, times), ratio])
    of_count = [cells[patterns[0], contexts[0], count] for count in counts]
    kv = [cell.subject.kv_bytes_per_token for cell in of_count]
    lines.append(["KV cache a token", "", *map(size, kv), f"{kv[0] / kv[-1]:.3g} × less"])
    if all(cell.quality and LOSS in cell.quality for cell in of_count):
        loss = [f"{(cell.quality or {})[LOSS]:.2f}" for cell in of_count]
        lines.append(
            ["cross-entropy, nats a token", "", *loss[:-1], f"**{loss[-1]}**", "the price of pooling without training"]
        )
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def limit(cells: Sequence[Cell]) -> str:
    """The line of the README's known limits; none where the targets are met."""
    missed = [context for context in LIMITS if not _met(cells, context)]
    if not missed:
        return "\n"
    targets = _at_contexts({context: f"{LIMITS[context]:g} ×" for context in missed})
    spans = " and ".join(_span(_ratios(cells, context), LIMITS[context]) for context in missed)
    return f"\n- The decode target of {targets} is not met in `{cells[0].subject.pattern}` ({spans}).\n"


def targets(cells: Sequence[Cell]) -> str:
    """What became of the targets, in a table cell."""
    counts = " / ".join(dict.fromkeys(cell.subject.groups_label for cell in cells))
    found = {}
    for context, most in LIMITS.items():
        verdict = "met" if _met(cells, context) else "**not met**"
        found[context] = f"{most:g} ×", f"{verdict}: " + " / ".join(_figure(ratio, most) for ratio in _ratios(cells, context))
    words = [f"{figure} at {context:,} tokens ({verdict})" for context, (figure, verdict) in found.items()]
    return f"its targets in `{cells[0].subject.pattern}`, × the floor at G = {counts}: {', '.join(words)}"


def slopes(cells: Sequence[Cell], run: Results) -> str:
    """What further tokens of context cost beside their floor, and the target."""
    rows = rows_of([dataclasses.replace(run, cells=tuple(cells))])
    lines = grouped(rows, lambda row: row.cell.subject.groups_label)
    found = {label: slope for label, line in lines.items() if (slope := slope_of(line))}
    floors = {label: slope.floor for label, slope in found.items() if slope.floor}
    ends = {label: (slope.value, slope.low, slope.high) for label, slope in found.items()}
    ratios = {label: [end / floor for end in ends[label]] for label, floor in floors.items()}
    undecided = {label: span for label, (_, *span) in ratios.items() if span[0] <= SLOPE < span[1]}
    doubt = "".join(f", **not decided** at G = {label}: {low:.2f} to {high:.2f}" for label, (low, high) in undecided.items())
    verdict = "met" if max(ratio for ratio, *_ in ratios.values()) <= SLOPE else "**not met**"
    costs, over = (found[label].text for label in ratios), (_figure(ratio, SLOPE) for ratio, *_ in ratios.values())
    return (
        f"1,000 further tokens of context cost {' / '.join(costs)} ms at G = {' / '.join(ratios)}, {' / '.join(over)} × their "
        f"floor of memory or arithmetic (target {SLOPE:g}, {verdict}{doubt})"
    )


def _benchmarks(folder: Path, run: Results) -> str:
    lines = [
        _attention(_read(folder / "attention.json")),
        *_floor(folder, run),
        *(f"{words}." for file in PEERS if (words := peers(folder, file))),
        *(f"{name}: {words}." for file, name in SHAPES.items() if (words := shape(folder, file))),
        *(f"{words}." for words in [generated(folder)] if words),
        _parity(_read(folder / "parity.json")),
    ]
    lines += [_export(_read(folder / "export.json"))]
    if (folder / "conversion.json").exists() and (folder / "uptraining.json").exists():
        lines += [_conversion(_read(folder / "conversion.json")), _uptraining(_read(folder / "uptraining.json"))]
    return "\n".join([*lines, "Every sample, the machine and the commands: [profiles/results](profiles/results/README.md)."])


def _attention(record: dict[str, Any]) -> str:
    where = "{heads} query heads of {head_dim}, {context:,} tokens, fp32".format(**record["settings"])
    rows = [row for row in record["rows"] if row["groups"] <= 4]
    times = " / ".join(str(row["groups"]) for row in rows)
    fast = " and ".join(
        f"`{pattern}` {' / '.join(format(row['gqa']['ms'] / row[pattern]['ms'], '.1f') for row in rows)} ×"
        for pattern in ("fused", "grouped")
        if pattern in rows[0]
    )
    return f"Attention alone ({where}), against ORT's fused operator: {fast} as fast at G = {times}."


def _floor(folder: Path, run: Results) -> list[str]:
    cells, measured, where = _decoder(folder)
    weights = [cell.subject.weight_bytes / 1e6 for cell in cells]
    spans = _at_contexts({context: _span(_ratios(cells, context), most) for context, most in LIMITS.items()})
    pattern, model = cells[0].subject.pattern, f"12-layer model ({min(weights):.0f} to {max(weights):.0f} MB of weights)"
    own = [_ratio(cell) for cell in run.cells if cell.floor and cell.subject.pattern == pattern]
    smollm = f"; one of SmolLM2 {_span(own)} at the best bandwidth of its run" if own else ""
    return [
        f"A decode step of a {model} in `{pattern}` takes {spans}, the floor being reads of its bytes in turns{where}{smollm}.",
        f"Our targets for the former, of its median: {_targets(cells)}. There {slopes(cells, measured)}.",
    ]


def peers(folder: Path, name: str) -> str:
    """How much faster headpool's fastest pattern is than the fastest other runtime of each place; "" before it is measured."""
    record, where = _found(folder, name)
    if not record:
        return ""
    rows = [row for row in record["rows"] if row["what"] in ("decode", "ttft")]
    (weights,) = {row["weights"] for row in rows}
    others = _others(rows)
    best = dict.fromkeys(row["runtime"] for row in rows if row.get("to_headpool") == 1)
    *names, last = dict.fromkeys(row["runtime"] for row in others)
    counts = " / ".join(map(str, dict.fromkeys(row["groups"] for row in others)))
    return (
        f"The same model and {weights} weights in {', '.join(names)} and {last}, all in turns: "
        f"{' or '.join(best).replace('headpool ', '')}, beside the fastest of them, is {_beside(others)} (G = {counts}){where}"
    )


def shape(folder: Path, name: str) -> str:
    """fp32 decode steps of another shape, of `scripts/peers`: `fused` against the floor and the fastest other runtime."""
    record, where = _found(folder, name)
    if not record:
        return ""
    rows = [row for row in record["rows"] if row["what"] == "decode" and row["weights"] == "fp32"]
    own = grouped([row for row in rows if row["runtime"] == "headpool `fused`"], lambda row: row["context"])
    counts = " / ".join(map(str, dict.fromkeys(row["groups"] for row in rows)))
    places = []
    for context, part in own.items():
        most = [max(r["ms"] / r["floor_ms"] for r in each) for each in grouped(part, lambda row: row["groups"]).values()]
        verdict = "met" if max(most) <= LIMITS[context] else "**not met**"
        places.append(f"{_slashed(most)} × the floor at {context:,} tokens (target {LIMITS[context]:g}, {verdict})")
    beside = _beside(_others(rows))
    return f"`fused` takes {', '.join(places)}; beside the fastest other runtime it is {beside} (fp32, G = {counts}){where}"


def int4(folder: Path) -> str:
    """int4 decode steps of few KV heads after a long context, beside the fastest other runtime, and the target."""
    record, where = _found(folder, "peers-int4")
    if not record:
        return ""
    context, least = INT4
    rows = [row for row in record["rows"] if row["what"] == "decode" and row["context"] == context]
    times = {row["groups"]: row["to_headpool"] for row in _fastest(_others(rows)) if row["groups"] <= 4}
    verdict = "met" if min(times.values()) >= least else "**not met**"
    return (
        f"{_slashed([*times.values()])} × as fast as the fastest other runtime at G = {' / '.join(map(str, times))} and "
        f"{context:,} tokens (target {least:g}, {verdict}){where}"
    )


def generated(folder: Path) -> str:
    """int4 text generation beside llama.cpp's."""
    record, where = _found(folder, "text")
    if not record:
        return ""
    rows, weights = record["rows"], record["settings"]["weight_bytes"]
    own, other = (
        [row["tokens_per_second"][name(row)] for row in rows] for name in (lambda _: "headpool", lambda r: r["beside"])
    )
    times = " / ".join(f"{row['times']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in rows)
    lengths = " / ".join(f"{row['prompt_tokens']:,}" for row in rows)
    ours, theirs = size(weights["headpool"]), size(weights["llama.cpp"])
    return (
        f"`headpool run` on SmolLM2-135M in int4 ({ours} of weights a step) makes {_slashed(own, 0)} tokens a second after a "
        f"text of {lengths} tokens, llama.cpp on its Q4_0 ({theirs}) {_slashed(other, 0)}: {times} ×{where}"
    )


def _beside(others: Sequence[dict[str, Any]]) -> str:
    """How much faster headpool is than the fastest of other runtimes, at each place, and whether the samples decide that."""
    places = []
    for (what, context), place in grouped(others, lambda row: (row["what"], row["context"])).items():
        fastest = _fastest(place)
        step = "in a step after" if what == "decode" else "to the first token after"
        undecided = [row for row in fastest if row.get("low") and row["low"] < 1 < row["high"]]
        spans = " / ".join(f"{row['low']:.2f} to {row['high']:.2f}" for row in undecided)
        counts = " / ".join(str(row["groups"]) for row in undecided)
        doubt = f" (**not decided** at G = {counts}: {spans})" if undecided else ""
        places.append(f"{_slashed([row['to_headpool'] for row in fastest])} × as fast {step} {context:,} tokens{doubt}")
    return ", ".join(places)


def _others(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["runtime"].startswith("headpool")]


def _fastest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the fastest runtime for each number of KV heads."""
    return [min(each, key=lambda row: row["to_headpool"]) for each in grouped(rows, lambda row: row["groups"]).values()]


def _slashed(values: Sequence[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _parity(record: dict[str, Any]) -> str:
    logits = [row["largest_logit_difference"] for row in record["rows"] if "largest_logit_difference" in row]
    close = f", and logits differ by at most {max(logits) * 1e6:.0f} millionths" if logits else ""
    tokens = f"{record['settings']['tokens']} greedy tokens from each of {len(record['settings']['prompts'])} prompts"
    verdict = "are those" if record["kept"] else "are **not all** those"
    missing = sorted(set(patterns.PATTERNS) - {row["pattern"] for row in record["rows"]})
    where = f"every pattern{' but ' + ' and '.join(missing) if missing else ''} and cache form"
    return f"{tokens} {verdict} of transformers in {where}{close}."


def _export(record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if row["what"] == "8B, linked"]
    seconds, memory = max(row["seconds"] for row in rows), size(max(row["peak_bytes"] for row in rows))
    return f"A checkpoint of Llama-3.1-8B's shape exports in {seconds:.0f} s and {memory} of memory."


def _conversion(record: dict[str, Any]) -> str:
    best = record["settings"]["best"]
    names = {"text": "on a text", "self": "on its own samples", "random": "on random tokens"}
    shares = ", ".join(f"{best[f'smollm2, 1 KV heads, {kind}']:.2f} measured {words}" for kind, words in names.items())
    verdict = "met" if record["kept"] else "**not met**"
    return (
        "Without training, `--method optimal` adds a fraction of the loss that pooling by the mean adds (SmolLM2, 3 → 1 KV "
        f"heads): {shares}; our targets of 0.10, 0.18 and 0.30 are {verdict}."
    )


def _uptraining(record: dict[str, Any]) -> str:
    rows = {(row["method"], row.get("alpha")): row["ratio"] for row in record["rows"]}
    return (
        f"A small model trained here, 8 → 2 KV heads, has {rows['mean', 0.0]:.2f} × the loss of MHA pooled by the mean and "
        f"{rows['optimal', 0.0]:.3f} × by `optimal`. Uptrained for 5 % of its steps that becomes {rows['mean', 0.05]:.2f} ×, "
        f"{rows['optimal', 0.05]:.3f} × and, `optimal` with the MHA model as teacher, {rows['distilled', 0.05]:.3f} ×; MHA "
        f"itself, trained on for as long, has {rows['none', 0.05]:.3f} ×."
    )


def _decoder(folder: Path) -> tuple[list[Cell], Results, str]:
    """The promised pattern's cells of the decoder benchmark, their floors reads; its run; and of which machine that is."""
    record, where = _found(folder, "decoder")
    run, pattern = decode(Results, record["run"], "run"), record["settings"]["patterns"][0]
    return [cell for cell in by_reads(run.cells) if cell.subject.pattern == pattern and cell.kind == "decode"], run, where


def _ratio(cell: Cell) -> float:
    assert cell.floor
    return stats.median(cell.samples) / cell.floor


def _ratios(cells: Sequence[Cell], context: int) -> list[float]:
    return [_ratio(cell) for cell in cells if cell.context == context]


def _met(cells: Sequence[Cell], context: int) -> bool:
    return all(ratio <= LIMITS[context] for ratio in _ratios(cells, context))


def _targets(cells: Sequence[Cell]) -> str:
    words = {context: "met" if _met(cells, context) else "not met yet" for context in LIMITS}
    return ", ".join(f"{most:g} × the floor at {context:,} tokens, {words[context]}" for context, most in LIMITS.items())


def _at_contexts(figures: dict[int, str]) -> str:
    first, *others = (f"{figure}{{}} at {context:,}{{}}" for context, figure in figures.items())
    return " and ".join([first.format(" the floor", " tokens"), *(other.format("", "") for other in others)])


def _figure(ratio: float, most: float) -> str:
    """Two digits; more where a ratio above `most` would else read as if it were not, or the other way round."""
    texts = (f"{ratio:.{digits}f}" for digits in range(2, 18))
    return next(text for text in texts if (float(text) <= most) == (ratio <= most))


def _span(values: Sequence[float], most: float = math.inf) -> str:
    low, high = (_figure(value, most) for value in (min(values), max(values)))
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def _found(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """A record of `folder`, or else of another machine's folder and words that name the machine; {} where there is none."""
    for path in (folder / f"{name}.json", *sorted(folder.parent.glob(f"*/{name}.json"))):
        if path.exists():
            record = _read(path)
            return record, "" if path.parent == folder else f", on another machine ({_machine(record['machine'])})"
    return {}, ""


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {size(machine['l3_bytes'])} of last-level cache"


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return record


def main(folder: Path = FOLDER) -> None:
    for page, marks in texts(folder).items():
        with replacing(page) as temporary:
            temporary.write_text(replace(page.read_text("utf-8"), marks), "utf-8")
        print(f"wrote the figures of {page}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
