"""Made-up results for the tests of this folder."""

from __future__ import annotations

import zlib

import numpy as np

from profiles.results import Bandwidth, Cell, Machine, Results, Subject

MACHINE = Machine("Test CPU 9000", 2, 2, 8_000_000_000, 32_000_000, ("avx2", "fma"), "Linux", (), 0.25)
BANDWIDTH = Bandwidth(2, 1 << 30, (30e9, 31e9, 29e9))


def subject(groups: int | tuple[int, ...] = 4, pattern: str = "grouped", **changes: object) -> Subject:
    heads, layers, head_dim = 9, 30, 64
    mean = sum(groups) / len(groups) if isinstance(groups, tuple) else groups
    values: dict = {
        "model": "SmolLM2-135M",
        "bundle": "bundle",
        "bundle_hash": "ab" * 32,
        "variant": f"g{groups}.{pattern}",
        "groups": groups,
        "heads": heads,
        "pattern": pattern,
        "cache": "static",
        "dtype": "fp32",
        "weight_bytes": 500_000_000,
        "kv_bytes_per_token": int(mean * head_dim * 2 * 4 * layers),
        "conversion": None if groups == heads else {"method": "mean", "kv_heads": [9]},
    }
    return Subject(**(values | changes))


def cell(what: Subject, kind: str = "decode", context: int = 1024, median: float = 0.02, **changes: object) -> Cell:
    rng = np.random.default_rng(zlib.crc32(f"{what.variant} {kind} {context}".encode()))
    values: dict = {
        "subject": what,
        "kind": kind,
        "batch": 1,
        "context": context,
        "capacity": context + 8,
        "backend": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "versions": {"onnxruntime": "1.31.1"},
        "options": {"threads": 2, "optimisation": "all"},
        "samples": tuple(float(s) for s in median * (1 + 0.03 * np.abs(rng.standard_normal(40)))),
        "burst": 4,
        "floor": (what.weight_bytes + context * what.kv_bytes_per_token) / 31e9 if kind == "decode" else None,
    }
    return Cell(**(values | changes))


def sweep(
    groups: tuple = (9, 3, 1),
    patterns: tuple = ("grouped", "gqa", "repeat"),
    contexts: tuple = (128, 1024, 4096),
    **changes: object,
) -> Results:
    """A whole sweep whose times behave as such times do."""
    over = {"grouped": (1.12, 1.0), "gqa": (1.2, 1.9), "repeat": (1.25, 3.4)}
    loss = {9: 2.59, 3: 2.6, 1: 4.61}
    cells = []
    for kind in ("decode", "prefill", "ttft"):
        for context in contexts:
            for pattern in patterns:
                for g in groups:
                    what = subject(g, pattern)
                    fixed, varying = over.get(pattern, (1.3, 1.3))
                    kv = what.kv_bytes_per_token if pattern == "grouped" else what.kv_bytes_per_token * 0.5 + 70_000
                    time = (what.weight_bytes * fixed + context * kv * varying * 1.3) / 31e9
                    time = time if kind == "decode" else context * 0.0016 + (0.001 if kind == "ttft" else 0)
                    parts = {
                        "attention": context * kv * varying * 1.3 / 31e9,
                        "matmul": 0.0161,
                        "other": 0.0011,
                        "runtime": 0.0006,
                    }
                    extra = {"breakdown": parts if kind == "decode" and context == max(contexts) else None}
                    quality = {"loss": loss[g], "agreement": 1 - (9 - g) / 20} if g in loss else None
                    cells.append(cell(what, kind, context, time, quality=quality, **extra))
    values: dict = {
        "created": "2026-11-22T01:00:00+00:00",
        "machine": MACHINE,
        "versions": {"headpool": "0.1.0", "python": "3.11.2"},
        "settings": {"samples": 40},
        "cells": tuple(cells),
        "bandwidth": BANDWIDTH,
    }
    return Results(**(values | changes))
