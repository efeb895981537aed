"""Caches of fp16 and int8 against fp32 in `fused`: a decode step of 12 layers with fp32 and int4 weights, the bytes of a
token, and what the rounding costs SmolLM2.

Promise: an int8 cache costs at most 0.01 nats a token, and at 4,096 tokens of context a step over it is nowhere slower.

    python -m profiles.benchmarks.kv_cache OUT.json MODEL.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from exporter.checkpoint import Checkpoint, open_source
from exporter.cli.console import progress_bar
from exporter.engines import open_session
from exporter.evaluate import cross_entropy, default_text
from exporter.export import ExportOptions, export
from exporter.files import refuse_existing
from exporter.tokenizer import Tokenizer
from profiles import stats
from profiles.benchmarks.decoder import CONFIG, GROUPS
from profiles.benchmarks.record import save
from profiles.bundles import profile_bundle
from profiles.measure import Plan
from profiles.results import Cell, Results

CACHES = (None, "fp16", "int8")
WEIGHTS = (None, "int4")
CONTEXTS, FAR, MOST_LOSS = (512, 4096), 4096, 0.01
SAMPLES = 32  # of a cell
TOKENS, WINDOW = 8193, 1024  # of the text that the loss is measured on
MEMORY = 1 << 40  # all in turns: sessions in `fused` share the weights of their bundle, which the plan does not know
PROMISE = f"an int8 cache costs at most {MOST_LOSS} nats a token, and a step over it is nowhere slower at {FAR:,} tokens"


def latency(config: Path, groups: tuple[int, ...], plan: Plan) -> Results:
    """Decode steps of `config` with random weights, every form of weights and cache and number of KV heads in one run."""
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        bundles = []
        for weights in WEIGHTS:
            for cache in CACHES:
                options = ExportOptions(groups, patterns=("fused",), quantize=weights, cache_dtype=cache)
                name = f"{weights or 'fp32'}-{cache or 'fp32'}"
                bundles.append(export(open_source(config), Path(folder) / name, options, progress).path)
        return profile_bundle(bundles, plan, progress=lambda done, total, _: progress("measuring latency", done, total))


def losses(checkpoint: Checkpoint, tokens: np.ndarray, window: int) -> list[dict[str, Any]]:
    """Cross-entropy in nats a token on `tokens`, over each form of cache."""
    rows = []
    for cache in CACHES:
        with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
            options = ExportOptions(patterns=("fused",), logits="all", cache_dtype=cache)
            bundle = export(checkpoint, Path(folder) / "bundle", options, progress)
            with open_session(bundle, capacity=window) as session:
                loss = cross_entropy(session, tokens, window, window // 2).nats_per_token
        size = bundle.variants[0].kv_bytes_per_token
        rows.append({"what": "loss", "cache": cache or "fp32", "kv_bytes_per_token": size, "nats_per_token": loss})
    return rows


def rows_of(results: Results) -> list[dict[str, Any]]:
    """One row a cell: ms, the floor, bytes of cache a token, and how many times as fast as over the fp32 cache."""
    assert results.bandwidth
    plain = {(_weights(cell), cell.subject.groups, cell.context): cell for cell in results.cells if _cache(cell) == "fp32"}
    return [_row(cell, plain[_weights(cell), cell.subject.groups, cell.context]) for cell in results.cells]


def _row(cell: Cell, plain: Cell) -> dict[str, Any]:
    low, high = stats.ratio_interval(plain.samples, cell.samples, block=cell.burst)
    p50 = stats.median(cell.samples)
    return {
        "what": "step",
        "weights": _weights(cell),
        "cache": _cache(cell),
        "groups": cell.subject.groups,
        "context": cell.context,
        "kv_bytes_per_token": cell.subject.kv_bytes_per_token,
        "p50_ms": p50 * 1e3,
        "floor_ms": (cell.floor or 0) * 1e3,
        "times": stats.median(plain.samples) / p50,
        "low": low,
        "high": high,
    }


def _weights(cell: Cell) -> str:
    return _form(cell, "weights")


def _cache(cell: Cell) -> str:
    return _form(cell, "cache")


def _form(cell: Cell, what: str) -> str:
    """ "int8" of "fp32, int4 weights, int8 cache" and "cache"; "fp32" where that is not said."""
    words = [part.split() for part in cell.subject.dtype.split(", ")[1:]]
    return next((form for form, named in words if named == what), "fp32")


def is_kept(rows: list[dict[str, Any]]) -> bool:
    steps = [row for row in rows if row["what"] == "step" and row["cache"] == "int8" and row["context"] == FAR]
    loss = {row["cache"]: row["nats_per_token"] for row in rows if row["what"] == "loss"}
    return bool(steps) and all(row["times"] >= 1 for row in steps) and loss["int8"] - loss["fp32"] <= MOST_LOSS


def main(
    out: Path,
    model: Path,
    config: Path = CONFIG,
    groups: tuple[int, ...] = GROUPS,
    contexts: tuple[int, ...] = CONTEXTS,
    count: int = TOKENS,
    **plan: Any,
) -> None:
    """Measure, print a line a row, and write `out`. `count` tokens are read for the loss; `plan` goes to Plan as it is."""
    refuse_existing(out)
    checkpoint = open_source(model)
    text = Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(default_text()[: 8 * count], special=False)
    results = latency(config, groups, Plan(contexts, kinds=("decode",), **{"samples": SAMPLES, "memory": MEMORY, **plan}))
    window = min(WINDOW, checkpoint.config.max_positions)
    rows = rows_of(results) + losses(checkpoint, text[:count], window)
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    kept = is_kept(rows)
    print(f"kept: {kept} ({PROMISE})")
    names = {"config": config.name, "model": checkpoint.name, "tokens": len(text[:count]), "window": window}
    save(out, "kv_cache", PROMISE, rows, kept, run=results, **names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
