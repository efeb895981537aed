"""`attention`: ONNX `Attention` (opset 24) with an explicit mask and the cache kept outside it.

TensorRT parses this to its fused attention layer, and TensorScatter to its KV-cache layer, but only so: one output, no
past/present inputs, no `is_causal` (it becomes upper-left, wrong for decode), no `nonpad_kv_seqlen` (ignored).
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
    mask = _mask(emit, node)
    output_BHTD = emit.op("Attention", "Attention", query_BHTD, present_key, present_value, mask, scale=node.scale)
    return common.merge_heads(emit, output_BHTD), present_key, present_value


def _mask(emit: Emitter, node: GroupedAttention) -> ir.Value:
    """[B,·,T,S], with a row for every query even where all see the same: ONNX Runtime does not broadcast it."""
    mask = common.mask(emit, node)
    if not node.reads_only or node.bias is not None:
        return mask
    key = ("query rows", mask)
    if key not in emit.shared:
        tokens, one = emit.op("mask/read/Shape", "Shape", node.query, start=1, end=2), emit.constant([1])
        shape = emit.op("mask/read/Concat", "Concat", one, one, tokens, one, axis=0)
        emit.shared[key] = emit.op("mask/read/Expand", "Expand", mask, shape)
    return emit.shared[key]
