"""A decode step of a whole decoder against the floor that memory bandwidth sets, on ONNX Runtime's CPU: 12 layers, d 1024,
16 heads, FFN 2816, vocabulary 32,000, fp32, random weights.

Promise: in the first of the patterns p50 is at most 1.1 × the floor at 512 tokens of context and 1.15 × at 4,096, for every G.
The floor is the median of reads of as many bytes, which take turns with the steps; the ratio at the best bandwidth of the run
stands beside it, but does not decide, as a median step is of a typical moment.

    python -m profiles.benchmarks.decoder OUT.json [PATTERN,…]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from exporter.checkpoint import open_source
from exporter.cli.console import progress_bar
from exporter.export import ExportOptions, export
from exporter.files import refuse_existing
from profiles import stats
from profiles.benchmarks.record import save
from profiles.bundles import profile_bundle, subject_of
from profiles.measure import Plan
from profiles.reading import READ, beside, by_reads
from profiles.results import Cell, Results

CONFIG = Path(__file__).parent.parent / "configs" / "decoder-12.json"
GROUPS = (16, 4, 1)
PATTERNS = ("fused", "grouped")
MEMORY = 0.85  # of what is available: all graphs of a context take turns, and with them the reads
LIMITS = {512: 1.1, 4096: 1.15}  # tokens of context: the most that p50 may be of the floor


def promise(pattern: str, limits: Mapping[int, float]) -> str:
    """What is promised, in words."""
    bounds = " and ".join(f"{limit:g} × the floor at {context:,} tokens" for context, limit in limits.items())
    return f"p50 of a decode step in `{pattern}` at most {bounds}, for every G; the floor is a read of its bytes, in turns"


def measure(config: Path, groups: tuple[int, ...], patterns: tuple[str, ...], plan: Plan) -> Results:
    """Export `config` with random weights and time its decode steps, and reads of the first pattern's bytes: the graphs of one
    context in turns, in one run."""
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        bundle = export(open_source(config), Path(folder) / "bundle", ExportOptions(groups, patterns=patterns), progress)
        reads = [beside(subject_of(bundle, v), v.config) for v in bundle.variants if v.pattern == patterns[0]]
        return profile_bundle(
            [bundle.path], plan, reads=reads, progress=lambda done, total, _: progress("measuring latency", done, total)
        )


def rows_of(results: Results, limits: Mapping[int, float]) -> list[dict[str, Any]]:
    """One row a cell; times are milliseconds. `kept` is by `ratio`, to the read that took turns with it."""
    steps = [cell for cell in results.cells if cell.backend != READ]
    return [_row(*both, limits[both[0].context]) for both in zip(by_reads(results.cells), steps, strict=True)]


def _row(cell: Cell, at_best: Cell, limit: float) -> dict[str, Any]:
    assert cell.floor
    assert at_best.floor
    p50 = stats.median(cell.samples)
    low, high = stats.median_interval(cell.samples, block=cell.burst)
    ratio = p50 / cell.floor
    return {
        "groups": cell.subject.groups,
        "pattern": cell.subject.pattern,
        "context": cell.context,
        "p50_ms": p50 * 1e3,
        "low_ms": low * 1e3,
        "high_ms": high * 1e3,
        "floor_ms": cell.floor * 1e3,
        "ratio": ratio,
        "ratio_at_best_bandwidth": p50 / at_best.floor,
        "limit": limit,
        "kept": ratio <= limit,
    }


def main(
    out: Path,
    config: Path = CONFIG,
    groups: tuple[int, ...] = GROUPS,
    patterns: tuple[str, ...] = PATTERNS,
    limits: Mapping[int, float] = LIMITS,
    **plan: Any,
) -> None:
    """Measure, print a line a row, and write `out`. `plan` goes to Plan as it is."""
    refuse_existing(out)
    memory = int(MEMORY * psutil.virtual_memory().available)
    results = measure(config, groups, patterns, Plan(tuple(limits), kinds=("decode",), memory=memory, **plan))
    rows = rows_of(results, limits)
    for row in rows:
        print(
            f"G {row['groups']:>2} {row['pattern']:<8} {row['context']:>5} tokens: p50 {row['p50_ms']:.1f} ms, "
            f"floor {row['floor_ms']:.1f} ms, {row['ratio']:.2f} × (at most {row['limit']:g} ×), "
            f"{row['ratio_at_best_bandwidth']:.2f} × at the best bandwidth"
        )
    kept, words = all(row["kept"] for row in rows if row["pattern"] == patterns[0]), promise(patterns[0], limits)
    print(f"kept: {kept} ({words})")
    save(out, "decoder", words, rows, kept, run=results, config=config.name, groups=groups, patterns=patterns)


if __name__ == "__main__":
    main(Path(sys.argv[1]), patterns=tuple(sys.argv[2].split(",")) if len(sys.argv) > 2 else PATTERNS)
