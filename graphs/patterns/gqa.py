"""`gqa`: `com.microsoft.GroupQueryAttention`, ONNX Runtime's fused operator: what onnxruntime-genai and ORT CUDA want.

static  past and present share a buffer of S rows; `seqlens_k` is each row's last position.
concat  every row counts as P + T long and the mask is passed as `attention_bias`: the operator's own way of telling row
        lengths assumes padding on the right, and is silently wrong on the left-padded batches of Hugging Face.

A bias of relative positions goes there too. For attention that only reads, cross-attention above all, the operator has no form:
that becomes `grouped`.
The operator wants K and V heads of one size. Where V is smaller (GLU attention) or larger, it reads a padded copy of the
smaller one, whose cache is written beside: it stays as small as it is, and a step takes the time of that copy.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.canonical import GroupedAttention
from graphs.emit import Emitter
from graphs.patterns import common, grouped

DOMAIN = "com.microsoft"


def check(node: GroupedAttention) -> str | None:
    if (size := max(node.head_dim, node.value_dim)) % 8:
        return f"its heads have {size} channels; GroupQueryAttention wants a multiple of 8"
    return None


def rewrite(node: GroupedAttention, emit: Emitter) -> tuple[ir.Value, ir.Value, ir.Value]:
    if node.reads_only:
        return grouped.rewrite(node, emit)
    key, value = _Half(node, emit, "key"), _Half(node, emit, "value")
    size = max(key.size, value.size)
    if node.position_ids is not None:
        lengths, total = _lengths_static(emit, node.position_ids)
        rest: list[ir.Value | None] = [None, None, None, _used_bias(emit, node, total)] if node.bias is not None else []
    else:
        lengths, total = _lengths_concat(emit, node)
        rest = [None, None, None, common.mask(emit, node)]  # cos_cache, sin_cache, position_ids, attention_bias
    output, present_key, present_value = emit.op(
        "GroupQueryAttention",
        "GroupQueryAttention",
        _wider(emit, "query", node.query, node.num_heads, key.size, size),
        key.new(size),
        value.new(size),
        key.past(size),
        value.past(size),
        lengths,
        total,
        *rest,
        domain=DOMAIN,
        outputs=3,
        num_heads=node.num_heads,
        kv_num_heads=node.kv_num_heads,
        scale=node.scale,
    )
    if size > value.size:
        output = _narrower(emit, output, node.num_heads, size, value.size)
    return output, key.present(present_key, size), value.present(present_value, size)


class _Half:
    """K or V of a node. The operator knows one head size: where this one is smaller, it reads a copy of the cache with zeros
    beside, and the cache itself, as small as it is, is written by a node of its own."""

    def __init__(self, node: GroupedAttention, emit: Emitter, name: str) -> None:
        values = (node.key, node.past_key, node.head_dim) if name == "key" else (node.value, node.past_value, node.value_dim)
        self.node, self.emit, self.name = node, emit, name
        self.rows, self.cache, self.size = values

    def new(self, size: int) -> ir.Value:
        return _wider(self.emit, f"new/{self.name}", self.rows, self.node.kv_num_heads, self.size, size)

    def past(self, size: int) -> ir.Value:
        if size == self.size:
            return self.cache
        pads = self.emit.constant([0] * 7 + [size - self.size])
        return self.emit.op(f"cache/{self.name}/Pad", "Pad", self.cache, pads)

    def present(self, wide: ir.Value, size: int) -> ir.Value:
        """`wide` is the operator's own."""
        return wide if size == self.size else common.update(self.emit, self.node, self.name)


def _wider(emit: Emitter, name: str, x_BTE: ir.Value, heads: int, size: int, wanted: int) -> ir.Value:
    """[B,T,heads·size] → [B,T,heads·wanted], zeros after each head."""
    if wanted == size:
        return x_BTE
    apart = emit.op(f"{name}/Reshape", "Reshape", x_BTE, emit.constant([0, 0, heads, size]))
    padded = emit.op(f"{name}/Pad", "Pad", apart, emit.constant([0] * 7 + [wanted - size]))
    return emit.op(f"{name}/wide/Reshape", "Reshape", padded, emit.constant([0, 0, heads * wanted]))


def _narrower(emit: Emitter, x_BTE: ir.Value, heads: int, size: int, wanted: int) -> ir.Value:
    """[B,T,heads·size] → [B,T,heads·wanted], the first channels of each head."""
    apart = emit.op("output/Reshape", "Reshape", x_BTE, emit.constant([0, 0, heads, size]))
    ends = (emit.constant([0]), emit.constant([wanted]), emit.constant([3]))
    kept = emit.op("output/Slice", "Slice", apart, *ends)
    return emit.op("output/narrow/Reshape", "Reshape", kept, emit.constant([0, 0, heads * wanted]))


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
