"""The whole line in one call: fewer KV heads → graphs → latency and quality → report.

OUT/bundle/       one graph for each KV-head count and pattern, common weights once
OUT/results.json  every sample
OUT/report.html   the page
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoint import Checkpoint
from exporter.convert import convert_weights
from exporter.engines.torch_eager import open_torch
from exporter.evaluate import agreement, cross_entropy, cut, default_text
from exporter.export import ExportOptions, export
from exporter.files import new_folder, refuse_existing
from exporter.tokenizer import TOKENIZER, Tokenizer
from profiles.bundles import profile_bundle
from profiles.measure import Plan
from profiles.report import write_report
from profiles.results import Results

Progress = Callable[[str, int, int], None]  # what, done, total
WINDOW = 512


@dataclass(frozen=True)
class SweepOptions:
    """What to make and how to measure it. `quality_tokens` 0 leaves quality out; a CONFIG has none to measure."""

    export: ExportOptions
    plan: Plan
    breakdown: tuple[int, ...] = ()
    backend: str = "onnxruntime"
    threads: int | None = None
    quality_tokens: int = 2048


def sweep(checkpoint: Checkpoint, out: Path, options: SweepOptions, progress: Progress) -> Results:
    """Write the folder `out`, whole or not at all, and return the results."""
    refuse_existing(out)
    with new_folder(out) as folder:
        export(checkpoint, folder / "bundle", options.export, progress)
        results = profile_bundle(
            [folder / "bundle"],
            options.plan,
            backend=options.backend,
            threads=options.threads,
            breakdown=options.breakdown,
            progress=lambda done, total, what: progress("measuring latency", done, total),
        )
        if options.quality_tokens and checkpoint.files and TOKENIZER in checkpoint.side_files:
            results = results.with_quality(_quality(checkpoint, options, results, progress))
        results.save(folder / "results.json")
        write_report([results], folder / "report.html")
    return results


def _quality(
    checkpoint: Checkpoint, options: SweepOptions, results: Results, progress: Progress
) -> dict[str, dict[str, float]]:
    """For each variant, cross-entropy (nats a token) and the share of next tokens that are the original model's.

    Measured in float32 torch on the same converted weights, one KV-head count at a time, on `default_text`.
    """
    tokenizer = Tokenizer.from_files(checkpoint.side_files, checkpoint.name)
    limit = options.quality_tokens
    tokens = tokenizer.encode(default_text()[: 8 * limit], special=False)[:limit]
    windows = cut(tokens, WINDOW, max(1, len(tokens) // WINDOW))
    counts = dict.fromkeys(cell.subject.groups for cell in results.cells)
    found: dict[object, dict[str, float]] = {}
    with open_torch(checkpoint, capacity=WINDOW) as original:
        for index, count in enumerate(counts):
            progress("measuring quality", index, len(counts))
            config, weights = convert_weights(
                checkpoint.config, checkpoint.weights, count, options.export.method, options.export.seed
            )
            converted = dataclasses.replace(checkpoint, config=config, weights=weights)
            with open_torch(converted, capacity=WINDOW) as session:
                loss = cross_entropy(session, tokens, WINDOW, WINDOW // 2)
                same = agreement(session, original, windows)
            found[count] = {"cross-entropy, nats a token": loss.nats_per_token, "same next token": same.same_token}
    progress("measuring quality", len(counts), len(counts))
    return {cell.subject.variant: found[cell.subject.groups] for cell in results.cells}
