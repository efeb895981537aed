"""Where the time of a decode step goes, from a runtime's own profile.

ONNX Runtime's (session option enable_profiling) is a JSON list of events in microseconds: one `model_run` a call, one
`<node>_kernel_time` a node within it. TensorRT's (IProfiler) is milliseconds a layer, which a session writes call by call.
"""

from __future__ import annotations

import bisect
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.errors import EngineError
from profiles.results import BREAKDOWN_CLASSES

# fmt: off
MATMULS = frozenset((
    "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MoE", "QMoE", "LinearChain",
))
ATTENTION = frozenset(("GroupQueryAttention", "Attention", "MultiHeadAttention", "FusedAttention", "TensorScatter"))
# fmt: on

# The first row that fits a node decides: its class, what its hierarchical name must hold, its operator types (None: any).
RULES: tuple[tuple[str, re.Pattern[str], frozenset[str] | None], ...] = (
    ("matmul", re.compile(r"_proj(/|$)|/mlp/|lm_head"), MATMULS),
    ("attention", re.compile(r"/(self_attn|cross_attn|attn|attention)/"), None),
    ("attention", re.compile(""), ATTENTION),
    ("matmul", re.compile(""), MATMULS),
    ("other", re.compile(""), None),
)

NODE = re.compile(r"/[\w.]+(?:/[\w.]+)+")


def classify(name: str, op_type: str) -> str:
    """The class of one node.

    matmul: products with weights. attention: all else inside a layer's attention (positions, cache, scores, softmax, weighted
    sum). other: norms, activations, residuals, the embedding.
    """
    return next(kind for kind, pattern, ops in RULES if pattern.search(name) and (ops is None or op_type in ops))


def read_breakdown(path: Path, runs: int) -> dict[str, float]:
    """Seconds by class of one call, the median of each class over the last `runs` calls of the profile at `path`: what the
    machine's other work costs now and then counts as little as in a p50.

    "runtime" is what the calls took beyond their kernels: scheduling, allocation, copies. Raises EngineError when the file is
    not such a profile or holds fewer calls.
    """
    try:
        events = [_event(item) for item in json.loads(path.read_text("utf-8")) if item.get("ph") == "X"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} is not an ONNX Runtime profile: {type(error).__name__}: {error}") from None
    calls = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["start"])[-runs:]
    if len(calls) < runs:
        raise EngineError(f"{path} holds {len(calls)} calls, {runs} are needed")
    starts = [call["start"] for call in calls]
    totals = [dict.fromkeys(BREAKDOWN_CLASSES, 0.0) for _ in calls]
    for kernel in (e for e in events if e["name"].endswith("_kernel_time")):
        index = bisect.bisect(starts, kernel["start"]) - 1
        if index >= 0:
            totals[index][classify(kernel["name"].removesuffix("_kernel_time"), kernel["op"])] += kernel["seconds"]
    for call, total in zip(calls, totals, strict=True):
        total["runtime"] = max(0.0, call["seconds"] - sum(total.values()))
    return {kind: statistics.median(total[kind] for total in totals) for kind in BREAKDOWN_CLASSES}


def read_layers(path: Path, steps: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one decode step by class, and by layer of a TensorRT engine in order; of each the median over the last
    `len(steps)` calls of the profile at `path`, which took `steps` seconds each.

    A layer's class is the first of matmul, attention and other that one of the nodes has which it was made of. "runtime" is
    what the calls took beyond their layers. Raises EngineError when the file is not such a profile or holds fewer calls.
    """
    try:
        told = json.loads(path.read_text("utf-8"))
        calls = [{str(name): float(ms) * 1e-3 for name, ms in call.items()} for call in told["calls"]][-len(steps) :]
        kinds = {name: _class_of(f"{name} {told['nodes'].get(name, '')}") for call in calls for name in call}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} is not a profile of a TensorRT engine: {type(error).__name__}: {error}") from None
    if len(calls) < len(steps):
        raise EngineError(f"{path} holds {len(calls)} calls, {len(steps)} are needed")
    totals = []
    for call, seconds in zip(calls, steps, strict=True):
        total = dict.fromkeys(BREAKDOWN_CLASSES, 0.0)
        for name, time in call.items():
            total[kinds[name]] += time
        totals.append({**total, "runtime": max(0.0, seconds - sum(call.values()))})
    classes = {kind: statistics.median(total[kind] for total in totals) for kind in BREAKDOWN_CLASSES}
    return classes, {name: statistics.median(call.get(name, 0.0) for call in calls) for name in kinds}


def _class_of(layer: str) -> str:
    """Of a TensorRT layer, by the names of its nodes, which end in their operator types."""
    found = {classify(node, node.rpartition("/")[2]) for node in NODE.findall(layer)}
    return next(kind for kind in ("matmul", "attention", "other") if kind in found or kind == "other")


def _event(item: dict[str, Any]) -> dict[str, Any]:
    op = item.get("args", {}).get("op_name", "")
    return {"name": item["name"], "op": op, "start": item["ts"] * 1e-6, "seconds": item["dur"] * 1e-6}
