"""Weight-only quantisation for ONNX Runtime: w ≈ (q − 2^(bits−1)) · scale, one scale for each block of BLOCK inputs.

A Gemm with such a weight becomes `com.microsoft.MatMulNBits`, a Gather of its rows `com.microsoft.GatherBlockQuantized`; the
pattern `fused` reads the same bytes in its own operator. Of a weight [N,K] there are two tensors,

NAME.int4     uint8 [N, K/BLOCK, BLOCK·bits/8]: q in order, of int4 two in a byte, the first in its low half
NAME.scales   [N, K/BLOCK] in the dtype of the graph

and for a Gather the same bytes once more by a name and shape of its own, NAME.int4.rows [N, K·bits/8].
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphs.errors import GraphError

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
DOMAIN = "com.microsoft"
# Activations go into the product as int8, too: what makes it faster than the bytes alone would.
ACCURACY_LEVEL = 4


def parts(name: str, kind: str) -> tuple[str, str]:
    """What the tensors of the quantised weight `name` are called: q, and its scales."""
    return f"{name}.{kind}", f"{name}.scales"


ROWS = ".rows"  # after the name of a q, what a Gather calls the same bytes


def stored_as(name: str) -> str:
    """The name of the tensor whose bytes the initialiser `name` has."""
    return name.removesuffix(ROWS)


def quantise(model: ir.Model, kind: str, names: Collection[str]) -> None:
    """Read each of the weights `names` [N,K] that `model` has in its quantised form, in place. Raises GraphError by name."""
    graph = model.graph
    for name in names:
        weight = graph.initializers.get(name)
        if weight is None:
            continue
        for use in list(weight.uses()):
            _replace(graph, use.node, weight, kind)
        del graph.initializers[name]
    model.graph.opset_imports[DOMAIN] = 1


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value, kind: str) -> None:
    assert weight.name is not None and weight.shape is not None  # noqa: PT018
    N, K = (int(size) for size in weight.shape.numpy())
    if K % BLOCK:
        raise GraphError(f"weight {weight.name} has {K} inputs, no multiple of {BLOCK}; it cannot be quantised in blocks")
    q_name, scales_name = parts(weight.name, kind)
    scales = _initializer(graph, scales_name, weight.dtype, [N, K // BLOCK])
    bytes_of_row = K * BITS[kind] // 8
    if _is_linear(node, weight):
        q = _initializer(graph, q_name, ir.DataType.UINT8, [N, K // BLOCK, bytes_of_row * BLOCK // K])
        bias = [None, None, node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] is not None else []
        inputs = [node.inputs[0], q, scales, *bias]
        attributes = {"N": N, "K": K, "bits": BITS[kind], "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
        new = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name)
    elif (node.domain, node.op_type) == ("", "Gather") and node.inputs[0] is weight and not _number(node, "axis"):
        q = _initializer(graph, q_name + ROWS, ir.DataType.UINT8, [N, bytes_of_row])
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": BITS[kind]}
        new = ir.node("GatherBlockQuantized", [q, node.inputs[1], scales], attributes, domain=DOMAIN, name=node.name)
    else:
        raise GraphError(f"weight {weight.name} is read by {node.op_type}, for which there is no quantised form")
    old, value = node.outputs[0], new.outputs[0]
    value.name, value.type, value.shape = f"{node.name}:quantised", old.type, old.shape
    graph.insert_before(node, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            value.name, old.name = old.name, None
            graph.outputs[index] = value
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)


def _is_linear(node: ir.Node, weight: ir.Value) -> bool:
    plain = all(_number(node, name, 1) == 1 for name in ("alpha", "beta")) and not _number(node, "transA")
    return (node.domain, node.op_type) == ("", "Gemm") and node.inputs[1] is weight and plain and bool(_number(node, "transB"))


def _number(node: ir.Node, name: str, otherwise: float = 0) -> float:
    return node.attributes[name].value if name in node.attributes else otherwise


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType | None, shape: list[int]) -> ir.Value:
    if name not in graph.initializers:
        assert dtype is not None
        graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return graph.initializers[name]
