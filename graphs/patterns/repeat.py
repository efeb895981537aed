"""`repeat`: K and V expanded to every query head, then MatMul-Softmax-MatMul. The graph everybody else exports.

Grouping then buys no time: each step writes and reads H heads of K and V whatever G is. It is here to be beaten.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.canonical import GroupedAttention
from graphs.emit import Emitter
from graphs.patterns import common


def check(node: GroupedAttention) -> str | None:
    return None


def rewrite(node: GroupedAttention, emit: Emitter) -> tuple[ir.Value, ir.Value, ir.Value]:
    present_key, present_value = common.update_cache(emit, node)
    query_BHTD = common.split_heads(emit, "query", node.query, node.num_heads, node.head_dim)
    key_BHSD = _repeat(emit, "repeat_key", present_key, node)
    value_BHSD = _repeat(emit, "repeat_value", present_value, node)
    key_BHDS = emit.op("scores/Transpose", "Transpose", key_BHSD, perm=[0, 1, 3, 2])
    scores = emit.op("scores/MatMul", "MatMul", query_BHTD, key_BHDS)
    scaled = common.scaled(emit, "scores", scores, node)
    masked = emit.op("scores/Add", "Add", scaled, common.mask(emit, node))
    weights = emit.op("weights/Softmax", "Softmax", masked, axis=-1)
    output_BHTD = emit.op("output/MatMul", "MatMul", weights, value_BHSD)
    return common.merge_heads(emit, output_BHTD), present_key, present_value


def _repeat(emit: Emitter, name: str, cache_BGSD: ir.Value, node: GroupedAttention) -> ir.Value:
    """[B,G,S,D] → [B,H,S,D], every KV head R times."""
    if node.group == 1:
        return cache_BGSD
    apart = emit.op(f"{name}/Unsqueeze", "Unsqueeze", cache_BGSD, emit.constant([2]))
    repeated = emit.op(f"{name}/Expand", "Expand", apart, emit.constant([1, 1, node.group, 1, 1]))
    size = node.head_dim if name == "repeat_key" else node.value_dim
    return emit.op(f"{name}/Reshape", "Reshape", repeated, emit.constant([0, node.num_heads, -1, size]))
