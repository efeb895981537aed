"""Milliseconds of a decode step by KV heads, measured here: what a selection for a latency target adds up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.checkpoint import Checkpoint
from exporter.export import ExportOptions, export
from profiles.bundles import check_plan, profile_bundle
from profiles.measure import Plan
from profiles.stats import median

Progress = Callable[[str, int, int], None]  # what, done, total
Counts = int | tuple[int, ...]  # KV heads of every layer, or one number a layer


def decode_seconds(
    checkpoint: Checkpoint,
    counts: Sequence[Counts],
    context: int,
    *,
    pattern: str,
    dtype: str,
    backend: str,
    threads: int | None,
    progress: Progress,
) -> dict[Counts, float]:
    """Median seconds a token at `context` tokens, batch 1, by KV heads; all of them measured in turns in one run.

    Heads are pooled by their mean: latency does not depend on the values of weights. The graphs lie in the system's folder for
    temporary files while they are measured. Raises UserError.
    """
    plan = Plan(contexts=(context,), kinds=("decode",))
    check_plan(plan, (), checkpoint.config)
    with tempfile.TemporaryDirectory(prefix="headpool-") as folder:
        options = ExportOptions(groups=tuple(counts), patterns=(pattern,), dtype=dtype)
        export(checkpoint, Path(folder) / "bundle", options, progress)
        results = profile_bundle(
            [Path(folder) / "bundle"],
            plan,
            backend=backend,
            threads=threads,
            progress=lambda done, total, what: progress("measuring latency", done, total),
        )
    return {cell.subject.groups: median(cell.samples) for cell in results.cells}
