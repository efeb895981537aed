"""Time per sample against KV heads in T5-XXL's layers on ONNX Runtime's CPU: figure 6 of "GQA" (Ainslie et al. 2023, arXiv
2305.13245) and the time column of its table 1.

d 4096, 64 heads of 64, FFN 10,240, vocabulary 32,128; of each stack's 24 layers one of the encoder and two of the decoder;
2,048 tokens in, 512 out, greedy, fp32, random weights. Every token is timed; the graphs take turns, a burst of steps each. How
long attention takes (all but its products with weights) is ONNX Runtime's own profile around the middle of the output, in turns
too; what its steps took beside the timed ones stands in each row.

Promise: from MHA down to G = 8 the attention of a decode step takes at most 1 / (0.7 · H/G) of MHA's.

    python -m profiles.benchmarks.t5_decoding OUT.json [PATTERN]    # fused unless it is named
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bundle import Bundle, Variant
from exporter.checkpoint import open_source
from exporter.cli.console import progress_bar
from exporter.engines import open_session
from exporter.engines.base import Session
from exporter.export import ExportOptions, export
from exporter.files import refuse_existing
from profiles import stats
from profiles.benchmarks.record import save
from profiles.breakdown import read_breakdown
from profiles.measure import random_tokens

CONFIG = Path(__file__).parent.parent / "configs" / "t5-xxl-2.json"
GROUPS = (64, 32, 16, 8, 1)
INPUT, OUTPUT = 2048, 512  # tokens
BURST, SETTLE = 32, 2  # steps of a turn; the first ones bring its weights back to the caches and count as the turn's median
TURNS = 4  # bursts of a profile
SHARE, DOWN_TO = 0.7, 8
PAPER = {64: 1.51, 8: 0.28, 1: 0.24}  # seconds a sample of T5-XXL, table 1
PROMISE = f"decode attention falls by at least {SHARE} · H/G up to G = {DOWN_TO}, {INPUT:,} tokens in and {OUTPUT} out"


def sample(sessions: dict[int, Session], source: int, target: int) -> dict[int, dict[str, float]]:
    """Seconds to the first token, of a step (the median) and of a whole sample, of every session."""
    first: dict[int, float] = {}
    steps: dict[int, list[float]] = {groups: [] for groups in sessions}
    tokens: dict[int, np.ndarray] = {}
    for groups, session in sessions.items():
        prompts, _ = random_tokens(session, source, 0)
        start = time.perf_counter()
        logits = session.prefill(prompts)
        first[groups] = time.perf_counter() - start
        tokens[groups] = logits.argmax(-1)
    order = list(sessions)
    while (left := target - 1 - len(steps[order[0]])) > 0:
        count = min(BURST, left)
        for groups in order:
            found = []
            for _ in range(count):
                start = time.perf_counter()
                logits = sessions[groups].decode(tokens[groups])
                found.append(time.perf_counter() - start)
                tokens[groups] = logits.argmax(-1)
            warm = stats.median(found[SETTLE:] or found)
            steps[groups] += [warm] * min(SETTLE, count) + found[SETTLE:]
        order.reverse()
    return {
        groups: {"first_token_s": first[groups], "step_ms": 1e3 * stats.median(steps[groups]),
                 "sample_s": first[groups] + sum(steps[groups])}
        for groups in sessions
    }  # fmt: skip


def breakdowns(
    bundle: Bundle, variants: dict[int, Variant], source: int, target: int, folder: Path
) -> dict[int, dict[str, float]]:
    """Seconds by class of a step around the middle of the output, of every variant."""
    burst = min(BURST, target // (2 * TURNS))
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(
                open_session(bundle, variant, capacity=source + target, profile_to=folder / f"profile-{variant.groups}")
            )
            for variant in variants.values()
        ]
        fed = []
        for session in sessions:
            prompts, tokens = random_tokens(session, source, 0)
            session.prefill(prompts)
            for _ in range((target - TURNS * burst) // 2):
                session.decode(tokens)
            fed.append((session, tokens))
        for _ in range(TURNS):
            for session, tokens in fed:
                for _ in range(burst):
                    session.decode(tokens)
            fed.reverse()
    # "_": not profile-16 for profile-1
    files = {groups: next(folder.glob(f"profile-{variant.groups}_*")) for groups, variant in variants.items()}
    return {groups: read_breakdown(file, TURNS * burst) for groups, file in files.items()}


def rows(config: Path, groups: Sequence[int], pattern: str, source: int, target: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        options = ExportOptions(tuple(groups), patterns=(pattern,))
        with progress_bar() as progress:
            bundle = export(open_source(config), Path(folder) / "bundle", options, progress)
        variants = dict(zip(groups, bundle.variants, strict=True))
        parts = breakdowns(bundle, variants, source, target, Path(folder))
        with contextlib.ExitStack() as stack:
            sessions = {
                count: stack.enter_context(open_session(bundle, variant, capacity=source + target))
                for count, variant in variants.items()
            }
            found = sample(sessions, source, target)
    H = max(parts)
    return [
        {
            "groups": count,
            "pattern": pattern,
            **found[count],
            **{f"{kind}_ms": 1e3 * seconds for kind, seconds in parts[count].items()},
            "profiled_to_timed": 1e3 * sum(parts[count].values()) / found[count]["step_ms"],
            "attention_gain": parts[H]["attention"] / parts[count]["attention"],
            "least_gain": SHARE * H / count if DOWN_TO <= count < H else None,
            "kv_bytes_per_token": variants[count].kv_bytes_per_token,
            "paper_s": PAPER.get(count),
        }
        for count in groups
    ]


def main(
    out: Path,
    pattern: str = "fused",
    config: Path = CONFIG,
    groups: Sequence[int] = GROUPS,
    source: int = INPUT,
    target: int = OUTPUT,
) -> None:
    refuse_existing(out)
    measured = rows(config, groups, pattern, source, target)
    for row in measured:
        row["kept"] = row["least_gain"] is None or row["attention_gain"] >= row["least_gain"]
        print(
            f"G {row['groups']:>2}: {row['sample_s']:.1f} s a sample ({row['first_token_s']:.1f} s to the first token, "
            f"{row['step_ms']:.1f} ms a step); attention {row['attention_ms']:.2f} ms, {row['attention_gain']:.2f} × faster "
            f"(profiled steps took {row['profiled_to_timed']:.2f} × the timed ones)"
        )
    kept = all(row["kept"] for row in measured)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "t5 decoding", PROMISE, measured, kept, config=config.name, input=source, output=target, pattern=pattern)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "fused")
