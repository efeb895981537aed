"""What the patterns share: heads apart, the cache update in both forms, and the additive mask (made once a graph)."""

from __future__ import annotations

import onnx_ir as ir

from graphs.canonical import GroupedAttention
from graphs.emit import Emitter


def split_heads(emit: Emitter, name: str, x_BTE: ir.Value, heads: int, size: int) -> ir.Value:
    """[B,T,heads·size] → [B,heads,T,size]. TensorRT takes a head size only where it is written out, not as −1.

    A RotaryEmbedding before it is applied to the split heads instead, and a Reshape before that is done in one go, since both
    leave the old nodes unused: three nodes fewer a layer, each some microseconds of a decode step.
    """
    producer = x_BTE.producer()
    if producer is not None and producer.op_type == "RotaryEmbedding" and producer.domain == "":
        x, *angles = producer.inputs
        assert x is not None
        attributes = {key: attribute.value for key, attribute in producer.attributes.items()}
        return emit.op(
            f"{name}/RotaryEmbedding", "RotaryEmbedding", split_heads(emit, name, x, heads, size), *angles, **attributes
        )
    source, shape = x_BTE, emit.constant([0, 0, heads, size])
    if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        source, shape = producer.inputs[0], _token_shape(emit, x_BTE, heads, size)
    apart = emit.op(f"{name}/Reshape", "Reshape", source, shape)
    return emit.op(f"{name}/Transpose", "Transpose", apart, perm=[0, 2, 1, 3])


def _token_shape(emit: Emitter, x_BTE: ir.Value, heads: int, size: int) -> ir.Value:
    """The Reshape target [B, T, heads, size]; one for all layers of equal heads. Every layer's B and T are the first one's."""
    if "batch_tokens" not in emit.shared:
        emit.shared["batch_tokens"] = emit.op("tokens/Shape", "Shape", x_BTE, start=0, end=2)
    key = ("token shape", heads, size)
    if key not in emit.shared:
        rest = emit.constant([heads, size])
        emit.shared[key] = emit.op(f"tokens/{heads}x{size}/Concat", "Concat", emit.shared["batch_tokens"], rest, axis=0)
    return emit.shared[key]


def merge_heads(emit: Emitter, x_BHTD: ir.Value) -> ir.Value:
    """[B,H,T,D] → [B,T,H·D]."""
    together = emit.op("output/Transpose", "Transpose", x_BHTD, perm=[0, 2, 1, 3])
    return emit.op("output/Reshape", "Reshape", together, emit.constant([0, 0, -1]))


def update_cache(emit: Emitter, node: GroupedAttention) -> tuple[ir.Value, ir.Value]:
    """present_key, present_value: TensorScatter into the static cache, Concat onto the other; what is only read as it is."""
    if node.reads_only:
        return node.past_key, node.past_value
    return update(emit, node, "key"), update(emit, node, "value")


def update(emit: Emitter, node: GroupedAttention, name: str) -> ir.Value:
    """The present "key" or "value"."""
    values = (node.past_key, node.key, node.head_dim) if name == "key" else (node.past_value, node.value, node.value_dim)
    past, new, size = values
    new_BGTD = split_heads(emit, f"cache/{name}", new, node.kv_num_heads, size)
    if node.position_ids is None:
        return emit.op(f"cache/{name}/Concat", "Concat", past, new_BGTD, axis=2)
    rows = _write_rows(emit, node.position_ids)
    return emit.op(f"cache/{name}/TensorScatter", "TensorScatter", past, new_BGTD, rows, axis=-2, mode="linear")


def _write_rows(emit: Emitter, position_ids: ir.Value) -> ir.Value:
    """int64 [B]: the cache row of each sequence's first new token."""
    if "write_rows" not in emit.shared:
        first = emit.constant(0)
        emit.shared["write_rows"] = emit.op("cache/write_rows/Gather", "Gather", position_ids, first, axis=1)
    return emit.shared["write_rows"]


def mask(emit: Emitter, node: GroupedAttention) -> ir.Value:
    """What is added to the scores, in the cache's dtype: 0 where query t sees cache row s, a finite lowest value where not.

    [B,1,T,S], [B,1,1,S] where all queries see the same, and [B,H,T,S] with the bias of a node that has one. One for all nodes
    that read the same.
    """
    key = ("mask", node.dtype, node.reads_only, node.attention_mask)
    if key not in emit.shared:
        form = _seen_static if node.static else _seen_read if node.reads_only else _seen_concat
        seen = form(emit, node)
        zero = emit.constant(0.0, node.dtype)
        emit.shared[key] = emit.op("mask/Where", "Where", seen, zero, emit.lowest(node.dtype))
    if node.bias is None:
        return emit.shared[key]
    biased = (*key, node.bias)
    if biased not in emit.shared:
        emit.shared[biased] = emit.op("mask/bias/Add", "Add", node.bias, emit.shared[key])
    return emit.shared[biased]


def scaled(emit: Emitter, name: str, x: ir.Value, node: GroupedAttention) -> ir.Value:
    """x · scale; x itself where that is 1."""
    return x if node.scale == 1.0 else emit.op(f"{name}/Mul", "Mul", x, emit.constant(node.scale, node.dtype))


def _seen_read(emit: Emitter, node: GroupedAttention) -> ir.Value:
    kept = emit.op("mask/read/Cast", "Cast", node.attention_mask, to=ir.DataType.BOOL)
    return emit.op("mask/read/Unsqueeze", "Unsqueeze", kept, emit.constant([1, 2]))


def _seen_static(emit: Emitter, node: GroupedAttention) -> ir.Value:
    assert node.position_ids is not None
    zero, one = emit.constant(0), emit.constant(1)
    shape = emit.op("mask/capacity/Shape", "Shape", node.past_key, start=2, end=3)
    capacity = emit.op("mask/capacity/Squeeze", "Squeeze", shape)
    rows_S = emit.op("mask/Range", "Range", zero, capacity, one)
    positions_B1T1 = emit.op("mask/Unsqueeze", "Unsqueeze", node.position_ids, emit.constant([1, 3]))
    return emit.op("mask/LessOrEqual", "LessOrEqual", rows_S, positions_B1T1)


def _seen_concat(emit: Emitter, node: GroupedAttention) -> ir.Value:
    assert node.attention_mask is not None
    zero, one = emit.constant(0), emit.constant(1)
    total = total_length(emit, node.attention_mask)
    tokens = emit.op("mask/new/Shape", "Shape", node.value, start=1, end=2)
    new = emit.op("mask/new/Squeeze", "Squeeze", tokens)
    columns = emit.op("mask/columns/Range", "Range", zero, total, one)
    past = emit.op("mask/past/Sub", "Sub", total, new)
    rows = emit.op("mask/rows/Range", "Range", past, total, one)
    rows_T1 = emit.op("mask/rows/Unsqueeze", "Unsqueeze", rows, emit.constant([1]))
    causal_TS = emit.op("mask/LessOrEqual", "LessOrEqual", columns, rows_T1)
    kept = emit.op("mask/Cast", "Cast", node.attention_mask, to=ir.DataType.BOOL)
    kept_B11S = emit.op("mask/Unsqueeze", "Unsqueeze", kept, emit.constant([1, 2]))
    return emit.op("mask/And", "And", causal_TS, kept_B11S)


def total_length(emit: Emitter, attention_mask: ir.Value) -> ir.Value:
    """int64 scalar: P + T."""
    if "total" not in emit.shared:
        shape = emit.op("mask/total/Shape", "Shape", attention_mask, start=1, end=2)
        emit.shared["total"] = emit.op("mask/total/Squeeze", "Squeeze", shape)
    return emit.shared["total"]
