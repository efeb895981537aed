"""`gqa`: `com.microsoft.GroupQueryAttention`, ONNX Runtime's fused operator: what onnxruntime-genai and ORT CUDA want.

static  past and present share a buffer of S rows; `seqlens_k` is each row's last position.
concat  every row counts as P + T long and the mask is passed as `attention_bias`: the operator's own way of telling row
        lengths assumes padding on the right, and is silently wrong on the left-padded batches of Hugging Face.

A bias of relative positions goes there too. For attention that only reads, cross-attention above all, the operator has no form:
that becomes `grouped`.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.canonical import GroupedAttention
from graphs.emit import Emitter
from graphs.patterns import common, grouped

DOMAIN = "com.microsoft"


def check(node: GroupedAttention) -> str | None:
    if node.head_dim != node.value_dim:
        return f"its K and V heads have {node.head_dim} and {node.value_dim} channels; GroupQueryAttention wants them equal"
    if node.head_dim % 8:
        return f"its heads have {node.head_dim} channels; GroupQueryAttention wants a multiple of 8"
    return None


def rewrite(node: GroupedAttention, emit: Emitter) -> tuple[ir.Value, ir.Value, ir.Value]:
    if node.reads_only:
        return grouped.rewrite(node, emit)
    if node.position_ids is not None:
        lengths, total = _lengths_static(emit, node.position_ids)
        rest: list[ir.Value | None] = [None, None, None, _used_bias(emit, node, total)] if node.bias is not None else []
    else:
        lengths, total = _lengths_concat(emit, node)
        rest = [None, None, None, common.mask(emit, node)]  # cos_cache, sin_cache, position_ids, attention_bias
    return emit.op(
        "GroupQueryAttention",
        "GroupQueryAttention",
        node.query,
        node.key,
        node.value,
        node.past_key,
        node.past_value,
        lengths,
        total,
        *rest,
        domain=DOMAIN,
        outputs=3,
        num_heads=node.num_heads,
        kv_num_heads=node.kv_num_heads,
        scale=node.scale,
    )


def finish(model: ir.Model) -> None:
    model.graph.opset_imports[DOMAIN] = 1


def _lengths_static(emit: Emitter, position_ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """seqlens_k int32 [B] (length − 1) and total_sequence_length int32 scalar."""
    if "seqlens_k" not in emit.shared:
        last = emit.op("lengths/Gather", "Gather", position_ids, emit.constant(-1), axis=1)
        lengths = emit.op("lengths/Cast", "Cast", last, to=ir.DataType.INT32)
        longest = emit.op("lengths/ReduceMax", "ReduceMax", lengths, keepdims=0)
        emit.shared["seqlens_k"] = lengths
        emit.shared["total_int32"] = emit.op("lengths/Add", "Add", longest, emit.constant(1, ir.DataType.INT32))
    return emit.shared["seqlens_k"], emit.shared["total_int32"]


def _used_bias(emit: Emitter, node: GroupedAttention, total: ir.Value) -> ir.Value:
    """The bias, [B,H,T,total]: the operator wants no rows that no sequence has used. It hides later positions itself."""
    key = ("used bias", node.bias)
    if key not in emit.shared:
        end = emit.op("bias/total/Cast", "Cast", total, to=ir.DataType.INT64)
        ends = emit.op("bias/total/Unsqueeze", "Unsqueeze", end, emit.constant([0]))
        emit.shared[key] = emit.op("bias/Slice", "Slice", node.bias, emit.constant([0]), ends, emit.constant([3]))
    return emit.shared[key]


def _lengths_concat(emit: Emitter, node: GroupedAttention) -> tuple[ir.Value, ir.Value]:
    assert node.attention_mask is not None
    if "seqlens_k" not in emit.shared:
        total = emit.op("lengths/Cast", "Cast", common.total_length(emit, node.attention_mask), to=ir.DataType.INT32)
        last = emit.op("lengths/Sub", "Sub", total, emit.constant(1, ir.DataType.INT32))
        batch = emit.op("lengths/Shape", "Shape", node.attention_mask, start=0, end=1)
        emit.shared["seqlens_k"] = emit.op("lengths/Expand", "Expand", last, batch)
        emit.shared["total_int32"] = total
    return emit.shared["seqlens_k"], emit.shared["total_int32"]
