"""One decode step of attention alone, a pattern against the others, at H = 32, D = 64 and 4096 tokens on ONNX Runtime's CPU.

Promise: `grouped` is at least twice as fast as com.microsoft.GroupQueryAttention for G ≤ 4, and its time falls with G.
The sessions of one G are alive at once and measured in turns. Each runs several layers of attention with a cache of its own, so
that K and V come from memory, as they do in a model, and what layers share (the mask) is paid once; times are for one layer.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporter.engines.cores import physical_cores
from exporter.engines.operators import operator_library
from graphs.canonical import standalone
from graphs.lower import lower
from profiles import stats
from profiles.benchmarks.record import save

HEADS, SIZE, CONTEXT = 32, 64, 4096
GROUPS = (32, 16, 8, 4, 2, 1)
PATTERNS = ("gqa", "attention", "repeat", "grouped", "fused")
ROUNDS, BURST = 16, 4
CACHE_BYTES = 128 << 20  # of K and V that one session walks through
PROMISE = f"grouped ≥ 2 × as fast as gqa at H={HEADS}, D={SIZE}, {CONTEXT} tokens, G ≤ 4; its time falls with G"


class Step:
    """One session over as many attention layers as CACHE_BYTES hold, each with a cache of its own, bound in place."""

    def __init__(self, pattern: str, groups: int, rng: np.random.Generator) -> None:
        import onnx_ir as ir
        import onnxruntime

        self.layers = max(2, CACHE_BYTES // (2 * groups * CONTEXT * SIZE * 4))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        if pattern == "fused":
            options.register_custom_ops_library(str(operator_library()))
        graph = lower(standalone(HEADS, groups, SIZE, layers=self.layers), pattern)
        proto = ir.to_proto(graph).SerializeToString()
        self.session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.samples: list[float] = []  # seconds a layer
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.binding.bind_ortvalue_input("position_ids", value(np.array([[CONTEXT - 1]])))
        for layer in range(self.layers):
            for name, width in (("query", HEADS), ("key", groups), ("value", groups)):
                new = rng.standard_normal((1, 1, width * SIZE), dtype=np.float32)
                self.binding.bind_ortvalue_input(f"{name}.{layer}", value(new))
            for name in ("key", "value"):
                cache = value(rng.standard_normal((1, groups, CONTEXT, SIZE), dtype=np.float32))
                self.binding.bind_ortvalue_input(f"past_{name}.{layer}", cache)
                self.binding.bind_ortvalue_output(f"present_{name}.{layer}", cache)
            self.binding.bind_ortvalue_output(f"output.{layer}", value(np.zeros((1, 1, HEADS * SIZE), np.float32)))

    def run(self, count: int, keep: bool) -> None:
        for _ in range(count):
            start = time.perf_counter()
            self.session.run_with_iobinding(self.binding)
            if keep:
                self.samples.append((time.perf_counter() - start) / self.layers)


def measure() -> list[dict[str, Any]]:
    """One row for each G: milliseconds of every pattern (median, and its 95 % interval)."""
    rng = np.random.default_rng(0)
    rows = []
    for groups in GROUPS:
        steps = {pattern: Step(pattern, groups, rng) for pattern in PATTERNS}
        for round_ in range(ROUNDS + 1):
            for pattern in PATTERNS if round_ % 2 else reversed(PATTERNS):
                steps[pattern].run(1, keep=False)  # untimed: brings back what the others pushed out
                steps[pattern].run(BURST, keep=round_ > 0)
        row: dict[str, Any] = {"groups": groups}
        for pattern, step in steps.items():
            low, high = stats.median_interval(step.samples, block=BURST)
            row[pattern] = {"ms": stats.median(step.samples) * 1e3, "low": low * 1e3, "high": high * 1e3}
            row[pattern]["samples"] = step.samples
        rows.append(row)
    return rows


def main() -> None:
    out = Path(sys.argv[1])
    rows = measure()
    grouped = [row["grouped"]["ms"] for row in rows]
    for row in rows:
        row["grouped_speed_up"] = row["gqa"]["ms"] / row["grouped"]["ms"]
        times = "  ".join(f"{pattern} {row[pattern]['ms']:.3f}" for pattern in PATTERNS)
        print(f"G {row['groups']:>2}: {times} ms; grouped {row['grouped_speed_up']:.2f}× as fast as gqa")
    fast = all(row["grouped_speed_up"] >= 2 for row in rows if row["groups"] <= 4)
    falls = all(more > fewer for more, fewer in itertools.pairwise(grouped))
    print(f"kept: {fast and falls} ({PROMISE})")
    save(out, "attention", PROMISE, rows, fast and falls, heads=HEADS, head_dim=SIZE, context=CONTEXT, threads=physical_cores())


if __name__ == "__main__":
    main()
