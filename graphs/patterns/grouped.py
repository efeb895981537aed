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
    H, G = node.num_heads, node.kv_num_heads
    present_key, present_value = common.update_cache(emit, node)

    query_BHTD = common.split_heads(emit, "query", node.query, H, node.head_dim)
    # Scaled here and not beside the MatMul: there ONNX Runtime makes it the MatMul's alpha, which has no fast path for one row.
    scaled = common.scaled(emit, "query", query_BHTD, node)
    rows_BGMD = emit.op("query/rows/Reshape", "Reshape", scaled, emit.constant([0, G, -1, node.head_dim]))  # M = R·T, r-major

    key_BGDS = emit.op("scores/Transpose", "Transpose", present_key, perm=[0, 1, 3, 2])
    scores_BGMS = emit.op("scores/MatMul", "MatMul", rows_BGMD, key_BGDS)
    masked = emit.op("scores/Add", "Add", scores_BGMS, _mask(emit, node))
    weights = emit.op("weights/Softmax", "Softmax", masked, axis=-1)

    output_BGMD = emit.op("output/MatMul", "MatMul", weights, present_value)
    heads_BHTD = emit.op("output/heads/Reshape", "Reshape", output_BGMD, emit.constant([0, H, -1, node.value_dim]))
    return common.merge_heads(emit, heads_BHTD), present_key, present_value


def _mask(emit: Emitter, node: GroupedAttention) -> ir.Value:
    """[B,1,R·T,S] or, with a bias, [B,G,R·T,S]: the mask of the T new tokens for each query head of a group; one for all
    layers of equal R. [B,1,1,S] where all queries see the same."""
    mask = common.mask(emit, node)
    if node.group == 1 or (node.reads_only and node.bias is None):
        return mask
    key = ("grouped mask", mask, node.group)
    if key not in emit.shared:
        name = f"mask/{node.group}"
        if node.bias is None:
            emit.shared[key] = emit.op(f"{name}/Tile", "Tile", mask, emit.constant([1, 1, node.group, 1]))
        else:  # its heads lie in the order of groups
            emit.shared[key] = emit.op(f"{name}/Reshape", "Reshape", mask, emit.constant([0, node.kv_num_heads, -1, 0]))
    return emit.shared[key]
