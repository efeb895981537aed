"""int8 and int4 weights against fp32: a decode step of 12 layers in `fused` and in ONNX Runtime's own operators, and what the
rounding costs SmolLM2 (profiles/benchmarks/rounding.py).

Promise: with int4 weights `fused` is at least 1.5 × as fast as `gqa`, ONNX Runtime's operators with the same weights, at 4,096
tokens of context with 4 and 1 KV heads, and nowhere slower; and that of rounding.py.

    python -m profiles.benchmarks.quantised OUT.json MODEL.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.checkpoint import open_source
from exporter.cli.console import progress_bar
from exporter.export import ExportOptions, export
from exporter.files import refuse_existing
from profiles import stats
from profiles.benchmarks import rounding
from profiles.benchmarks.decoder import CONFIG, GROUPS
from profiles.benchmarks.record import Rows, save
from profiles.bundles import profile_bundle
from profiles.measure import Plan
from profiles.results import Results

KINDS = (None, "int8", "int4")
PATTERNS = ("fused", "gqa")
CONTEXTS, FAR, FEW, TIMES = (512, 4096), 4096, (4, 1), 1.5
SAMPLES = 32  # of a cell
PROMISE = (
    f"int4 weights: `fused` at least {TIMES} × as fast as `gqa` at {FAR:,} tokens with {' and '.join(map(str, FEW))} KV heads, "
    f"nowhere slower; {rounding.PROMISE}"
)


def latency(config: Path, groups: tuple[int, ...], plan: Plan) -> Results:
    """Decode steps of `config` with random weights, every kind, pattern and number of KV heads in one run."""
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        bundles = []
        for kind in KINDS:
            options = ExportOptions(groups, patterns=PATTERNS, quantize=kind)
            bundles.append(export(open_source(config), Path(folder) / f"{kind or 'fp32'}", options, progress).path)
        return profile_bundle(bundles, plan, progress=lambda done, total, _: progress("measuring latency", done, total))


def rows_of(results: Results) -> list[dict[str, Any]]:
    """One row a number of KV heads, context and kind: ms of each pattern, and how much faster `fused` is."""
    assert results.bandwidth
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in results.cells:
        weights = cell.subject.dtype.removesuffix(" weights").split(", ")[-1]
        row = found.setdefault((cell.subject.groups, cell.context, weights), {"samples": {}})
        row["samples"][cell.subject.pattern] = (cell.samples, cell.burst)
        row["floor_ms" if cell.subject.pattern == "fused" else "_"] = (cell.floor or 0) * 1e3
    rows = []
    for (groups, context, weights), row in found.items():
        (ours, burst), (theirs, _) = row["samples"]["fused"], row["samples"]["gqa"]
        low, high = stats.ratio_interval(theirs, ours, block=burst)
        ours_ms, theirs_ms = stats.median(ours) * 1e3, stats.median(theirs) * 1e3
        what = {"what": "step", "weights": weights, "groups": groups, "context": context}
        times = {"fused_ms": ours_ms, "gqa_ms": theirs_ms, "floor_ms": row["floor_ms"]}
        rows.append({**what, **times, "times": theirs_ms / ours_ms, "low": low, "high": high})
    return rows


def is_kept(rows: list[dict[str, Any]]) -> bool:
    steps = [row for row in rows if row["what"] == "step" and row["weights"] == "int4"]
    far = [row["times"] for row in steps if row["context"] == FAR and row["groups"] in FEW]
    fast = bool(far) and min(far) >= TIMES and all(row["times"] >= 1 for row in steps)
    return fast and rounding.is_kept(rows)


def main(
    out: Path,
    model: Path,
    config: Path = CONFIG,
    groups: tuple[int, ...] = GROUPS,
    contexts: tuple[int, ...] = CONTEXTS,
    pieces: tuple[int, int] = (rounding.PIECES, rounding.LENGTH),
    **plan: Any,
) -> None:
    """Measure, print a line a row, and write `out`. `plan` goes to Plan as it is."""
    refuse_existing(out)
    checkpoint = open_source(model)
    results = latency(config, groups, Plan(contexts, kinds=("decode",), **{"samples": SAMPLES, **plan}))
    held = Rows(out.with_name(out.name + ".rows"))
    rows = rows_of(results) + rounding.measure(checkpoint, held, *pieces)
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    kept = is_kept(rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "quantised", PROMISE, rows, kept, run=results, config=config.name, model=checkpoint.name, pieces=pieces)
    held.path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
