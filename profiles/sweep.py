"""The whole line in one call: fewer KV heads → graphs → latency and quality → report.

OUT/bundle/       one graph for each KV-head count and pattern, common weights once; with several FFNs bundle-KIND/ for each
OUT/results.json  every sample
OUT/report.html   the page
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.config import ModelConfig
from exporter.convert import Converter
from exporter.doctor import check_runs
from exporter.engines import BACKENDS
from exporter.engines.torch_eager import open_torch
from exporter.errors import EngineError, UserError, one_of
from exporter.evaluate import agreement, check_text, cross_entropy, cut, default_text
from exporter.export import DEFAULT_CACHE, ExportOptions, check_options, converter, export
from exporter.files import new_folder, refuse_existing
from exporter.quantise import Quantiser, restored
from exporter.tokenizer import TOKENIZER, Tokenizer
from profiles.bundles import check_plan, profile_bundle
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


def sweep(
    checkpoint: Checkpoint, out: Path, options: SweepOptions, progress: Progress, models: Sequence[Checkpoint] = ()
) -> Results:
    """Write the folder `out`, whole or not at all, and return the results.

    `models` are what is measured in place of `checkpoint`, a CONFIG: the same with other FFNs (profiles/ffn.py).
    """
    refuse_existing(out)
    check_plan(options.plan, options.breakdown, checkpoint.config)
    check_options(checkpoint.config, options.export)
    _check_backend(checkpoint.config, options)
    text = _text(checkpoint, options.quality_tokens)
    convert = converter(checkpoint, options.export, progress)
    with new_folder(out) as folder:
        made = {f"bundle-{model.config.ffn}": model for model in models} or {"bundle": checkpoint}
        for name, model in made.items():
            export(model, folder / name, options.export, progress, None if models else convert)
        results = profile_bundle(
            [folder / name for name in made],
            options.plan,
            backend=options.backend,
            threads=options.threads,
            breakdown=options.breakdown,
            progress=lambda done, total, what: progress("measuring latency", done, total),
        )
        if text is not None:
            results = results.with_quality(_quality(checkpoint, text, convert, options.export.cache_dtype, results, progress))
        results.save(folder / "results.json")
        write_report([results], folder / "report.html")
    return results


def _check_backend(config: ModelConfig, options: SweepOptions) -> None:
    """Refuse a backend that cannot run what is to be exported, before it is. Raises EngineError."""
    if options.backend not in BACKENDS:
        raise EngineError(one_of("backend", options.backend, BACKENDS))
    backend = BACKENDS[options.backend]
    if backend.runtime != "onnxruntime":
        raise EngineError(
            f"sweep builds no engines, and {options.backend} runs nothing else; take the steps one by one: headpool export, "
            f"headpool build --backend {options.backend}, headpool profile --backend {options.backend}"
        )
    for kv_heads in options.export.groups or (config.kv_heads,):
        for pattern in options.export.patterns:
            cache = options.export.cache or DEFAULT_CACHE[pattern]
            provider = backend.options.get("provider", "CPUExecutionProvider")
            kinds = options.export.dtype, options.export.cache_dtype
            check_runs(provider, config.with_kv_heads(kv_heads), pattern, cache, *kinds)


def _text(checkpoint: Checkpoint, count: int) -> np.ndarray | None:
    """The first `count` token ids (int64) of `default_text`, to measure quality on; None where there is none to measure."""
    if not count or not checkpoint.files:
        return None
    if TOKENIZER not in checkpoint.side_files:
        raise UserError(f"{checkpoint.name} has no {TOKENIZER}, which quality is measured with; add it, or --quality-tokens 0")
    tokens = Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(default_text()[: 8 * count], special=False)
    check_text(tokens[:count])
    if (most := int(tokens[:count].max())) >= checkpoint.config.vocab_size:
        raise UserError(
            f"the tokenizer of {checkpoint.name} has token id {most}, which is outside its vocabulary of "
            f"{checkpoint.config.vocab_size}; sweep without quality: --quality-tokens 0"
        )
    return tokens[:count]


def _quality(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    convert: Converter | Quantiser,
    cache_dtype: str | None,
    results: Results,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """For each variant, cross-entropy (nats a token) and the share of next tokens that are the original model's, on `tokens`.

    Measured in float32 torch on the same converted weights, rounded where they are quantised, over a cache stored as theirs
    are, one KV-head count at a time.
    """
    window = min(WINDOW, checkpoint.config.max_positions)
    windows = cut(tokens, window, max(1, len(tokens) // window))
    counts = dict.fromkeys(cell.subject.groups for cell in results.cells)
    found: dict[object, dict[str, float]] = {}
    with open_torch(checkpoint, capacity=window) as original:
        for index, count in enumerate(counts):
            progress("measuring quality", index, len(counts))
            config, weights = convert(count)
            if isinstance(convert, Quantiser):
                weights = restored(weights, convert.form)
            converted = dataclasses.replace(checkpoint, config=config, weights=weights)
            with open_torch(converted, capacity=window, cache_dtype=cache_dtype) as session:
                loss = cross_entropy(session, tokens, window, window // 2)
                same = agreement(session, original, windows)
            found[count] = {"cross-entropy, nats a token": loss.nats_per_token, "same next token": same.same_token}
    progress("measuring quality", len(counts), len(counts))
    return {cell.subject.variant: found[cell.subject.groups] for cell in results.cells}
