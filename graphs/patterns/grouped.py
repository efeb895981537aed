"""`grouped`: the R query heads of a group become rows of one batched MatMul against the group's K and V.

K and V are then read once a group, so a decode step's attention time falls with G. Only standard operators: it runs on any
runtime, and fast on one with no fused grouped-attention kernel (ONNX Runtime's CPU).
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.canonical import GroupedAttention
from graphs.emit import Emitter
from graphs.patterns import common


def check(node: GroupedAttention) -> str | None:
    return None


def rewrite(node: GroupedAttention, emit: Emitter) -> tuple[ir.Value, ir.Value, ir.Value]:
    G, R, Dv = node.kv_num_heads, node.group, node.value_dim
    present_key, present_value = common.update_cache(emit, node)

    scaled = emit.op("query/Mul", "Mul", node.query, emit.constant(node.scale, node.dtype))
    apart = emit.op("query/Reshape", "Reshape", scaled, emit.constant([0, 0, G, R, -1]))
    by_group = emit.op("query/Transpose", "Transpose", apart, perm=[0, 2, 3, 1, 4])
    rows_BGMD = emit.op("query/rows/Reshape", "Reshape", by_group, emit.constant([0, 0, -1, node.head_dim]))  # M = R·T

    key_BGDS = emit.op("scores/Transpose", "Transpose", present_key, perm=[0, 1, 3, 2])
    scores_BGMS = emit.op("scores/MatMul", "MatMul", rows_BGMD, key_BGDS)
    unfolded = emit.op("scores/Reshape", "Reshape", scores_BGMS, _shape(emit, node, "unfolded", [0, 0, R, -1]))
    masked = emit.op("scores/Add", "Add", unfolded, _mask(emit, node))  # [B,G,R,T,S]
    weights = emit.op("weights/Softmax", "Softmax", masked, axis=-1)
    folded = emit.op("weights/Reshape", "Reshape", weights, _shape(emit, node, "folded", [0, 0, -1]))

    output_BGMD = emit.op("output/MatMul", "MatMul", folded, present_value)
    heads = emit.op("output/heads/Reshape", "Reshape", output_BGMD, emit.constant([0, 0, R, -1, Dv]))
    by_token = emit.op("output/Transpose", "Transpose", heads, perm=[0, 3, 1, 2, 4])
    return emit.op("output/Reshape", "Reshape", by_token, emit.constant([0, 0, -1])), present_key, present_value


def _shape(emit: Emitter, node: GroupedAttention, name: str, head: list[int]) -> ir.Value:
    """The Reshape target [*head, S]; one for all layers of equal R."""
    key = (name, *head)
    if key not in emit.shared:
        if "columns" not in emit.shared:
            emit.shared["columns"] = emit.op("scores/columns/Shape", "Shape", common.mask(emit, node), start=3, end=4)
        emit.shared[key] = emit.op(f"scores/{name}/Concat", "Concat", emit.constant(head), emit.shared["columns"], axis=0)
    return emit.shared[key]


def _mask(emit: Emitter, node: GroupedAttention) -> ir.Value:
    """[B,1,1,T,S]."""
    key = ("grouped mask", node.dtype)
    if key not in emit.shared:
        emit.shared[key] = emit.op("mask/grouped/Unsqueeze", "Unsqueeze", common.mask(emit, node), emit.constant([2]))
    return emit.shared[key]
