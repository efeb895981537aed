"""`fused`: headpool's own operators for ONNX Runtime (runtime/ops), fp32 and static cache.

The attention of a layer is one node, `headpool::FusedAttention`:

Inputs   query [B,T,H·D] or [B·T,H·D], key, value, past_key [B,G,S,D], past_value [B,G,S,Dv], position_ids int64 [B,T] as the
         canonical node has them, but before RoPE; cos, sin [B,T,rotary/2] (optional); bias [B or 1,H or 1,T or 1,S]
         (optional); attention_mask int64 [B,S] (optional). Of query, key and value only the order of the elements counts:
         with QK-norm they come as [B·T·H,D]. Without key, value and position_ids all rows of the cache are read, but for
         those where attention_mask is 0.
Outputs  output [B,T,H·Dv], or [B·T,H·Dv] where query has two dimensions, and where rows are written present_key and
         present_value.

The caches, all of one type, are stored as they are or in a form of graphs/caches.py: FLOAT16 [B,G,S,D], or INT8 [B,G,S,D+4], a
row's values followed by its scale. New rows are rounded as they are written, and attention reads all rows, the new ones too,
as what they were rounded to.

It rotates, writes the new rows into the cache where that lies, and reads the used rows of the cache once a group, whatever
the capacity. The linear layers between two attentions become one `headpool::LinearChain` (graphs/linear.py, graphs/chain.py),
which reads their weights at the memory's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphs import canonical
from graphs.caches import row_width
from graphs.canonical import GroupedAttention
from graphs.chain import chain_linears
from graphs.emit import Emitter
from graphs.linear import fuse_linears

STORED = {"fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}  # graphs/caches.py
WORDS = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}  # as --dtype has them


def check(node: GroupedAttention) -> str | None:
    if not (node.static or node.reads_only):
        return "its cache is concat; headpool's operators work on a static cache"
    if node.dtype != ir.DataType.FLOAT:
        return f"it is {WORDS.get(node.dtype, node.dtype.name)}; headpool's operators are for fp32"
    return None


def rewrite(node: GroupedAttention, emit: Emitter) -> tuple[ir.Value, ir.Value, ir.Value]:
    if node.reads_only:
        output = _attention(node, emit, node.query, [None, None], [None, None], outputs=1)
        return output, node.past_key, node.past_value
    query, angles = _before_rotation(node.query)
    key, key_angles = _before_rotation(node.key)
    if angles != key_angles:  # not both rotated, and by the same angles: the operator does both or none
        query, key, angles = node.query, node.key, [None, None]
    new = [_before_reshape(key), _before_reshape(node.value)]
    return _attention(node, emit, query, new, angles, outputs=3)


def _attention(
    node: GroupedAttention,
    emit: Emitter,
    query: ir.Value,
    new: Sequence[ir.Value | None],
    angles: Sequence[ir.Value | None],
    outputs: int,
) -> Any:
    inputs = [query, *new, node.past_key, node.past_value, node.position_ids, *angles, node.bias, node.attention_mask]
    return emit.op(
        "FusedAttention",
        "FusedAttention",
        *inputs,
        domain=canonical.DOMAIN,
        outputs=outputs,
        num_heads=node.num_heads,
        kv_num_heads=node.kv_num_heads,
        scale=node.scale,
    )


def finish(model: ir.Model) -> None:
    for node in _attentions(model):
        _drop_reshapes(model.graph, node)
    fuse_linears(model)
    chain_linears(model)
    model.graph.opset_imports[canonical.DOMAIN] = canonical.VERSION


def store(model: ir.Model, cache: str) -> None:
    for node in _attentions(model):
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            assert value is not None and value.shape is not None  # noqa: PT018
            *rows, size = value.shape
            assert isinstance(size, int), value.name
            value.type, value.shape = ir.TensorType(STORED[cache]), ir.Shape([*rows, row_width(size, cache)])  # neither shared


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (canonical.DOMAIN, "FusedAttention")]


def _drop_reshapes(graph: ir.Graph, node: ir.Node) -> None:
    """Where only Reshapes to [−1, H·Dv] follow, the operator gives that itself, for a query of two dimensions."""
    output, cache = node.outputs[0], node.inputs[4]
    query = _before_reshape(node.inputs[0]) if node.inputs[0] is not None else None
    if query is None or query.shape is None or len(query.shape) != 2 or output.is_graph_output():
        return
    assert cache is not None and cache.shape is not None  # noqa: PT018
    width = node.attributes["num_heads"].as_int() * int(cache.shape[3])  # type: ignore[arg-type]
    reshapes = [use.node for use in output.uses()]
    if not all(_flattens(reshape, width) for reshape in reshapes):
        return
    node.replace_input_with(0, query)
    for reshape in reshapes:
        output.shape = reshape.outputs[0].shape
        reshape.outputs[0].replace_all_uses_with(output)
        graph.remove(reshape, safe=True)


def _flattens(node: ir.Node, width: int) -> bool:
    """Whether it is a Reshape to [−1, width] whose output only other nodes read."""
    if (node.domain, node.op_type) != ("", "Reshape") or node.outputs[0].is_graph_output():
        return False
    target = node.inputs[1].const_value if node.inputs[1] is not None else None
    return target is not None and target.numpy().tolist() == [-1, width]


def _before_rotation(x: ir.Value) -> tuple[ir.Value, list[ir.Value | None]]:
    producer = x.producer()
    if producer is None or (producer.domain, producer.op_type) != ("", "RotaryEmbedding"):
        return x, [None, None]
    interleaved = producer.attributes.get("interleaved")
    if len(producer.inputs) > 3 or producer.inputs[0] is None or (interleaved is not None and interleaved.as_int()):
        return x, [None, None]
    return producer.inputs[0], list(producer.inputs[1:])


def _before_reshape(x: ir.Value) -> ir.Value:
    """Only the order of the elements matters to the operator, and a Reshape keeps it."""
    producer = x.producer()
    if producer is not None and (producer.domain, producer.op_type) == ("", "Reshape") and producer.inputs[0] is not None:
        return producer.inputs[0]
    return x
