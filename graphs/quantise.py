"""Weight-only quantisation for ONNX Runtime: w ≈ (q − zero) · scale, with a scale for each block of inputs.

A Gemm with such a weight becomes `com.microsoft.MatMulNBits`, a Gather of its rows `com.microsoft.GatherBlockQuantized`; the
pattern `fused` reads the same bytes in its own operator. Of a weight [N,K] in blocks of B there are

NAME.int4     uint8 [N, K/B, B·bits/8]: q in order, of int4 two in a byte, the first in its low half (NAME.int8 of 8 bits)
NAME.scales   [N, K/B] in the dtype of the graph
NAME.zeros    uint8 [N, ⌈K/B · bits/8⌉]: the zeros in the same order, where a form has them; else they are 2^(bits−1)

and for a Gather the bytes of q once more by a name and shape of their own, NAME.int4.rows [N, K·bits/8].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphs.errors import GraphError


@dataclass(frozen=True)
class Form:
    """How matrices are stored. Blocks are of `block` inputs, or of the most that divide a width and it."""

    bits: int
    block: int
    zeros: bool  # each block has a zero of its own

    @property
    def middle(self) -> int:
        """The zero of those that have none of their own."""
        return 1 << (self.bits - 1)

    def block_of(self, K: int) -> int:
        return math.gcd(K, self.block)

    def parts(self, name: str) -> tuple[str, ...]:
        """What the tensors of the weight `name` are called: q, its scales, and where there are any its zeros."""
        return (f"{name}.int{self.bits}", f"{name}.scales", f"{name}.zeros")[: 2 + self.zeros]

    def shapes(self, N: int, K: int) -> tuple[tuple[int, ...], ...]:
        """Their shapes, of a weight [N,K]."""
        block = self.block_of(K)
        q, scales = (N, K // block, block * self.bits // 8), (N, K // block)
        return (q, scales, (N, -(-K // block * self.bits // 8)))[: 2 + self.zeros]


BLOCK = 32  # of the plain forms, and what every width has to be a multiple of
FORMS = {
    f"int{bits}{f'-{block}' * (block != BLOCK)}{'-zp' * zeros}": Form(bits, block, zeros)
    for bits in (8, 4)
    for block in (BLOCK, 128)
    for zeros in (False, True)
}
DOMAIN = "com.microsoft"
# Activations go into the product as int8, too: what makes it faster than the bytes alone would.
ACCURACY_LEVEL = 4


ROWS = ".rows"  # after the name of a q, what a Gather calls the same bytes


def stored_as(name: str) -> str:
    """The name of the tensor whose bytes the initialiser `name` has."""
    return name.removesuffix(ROWS)


def quantise(model: ir.Model, form: Form, names: Collection[str]) -> None:
    """Read each of the weights `names` [N,K] that `model` has in its quantised form, in place. Raises GraphError by name."""
    graph = model.graph
    for name in names:
        weight = graph.initializers.get(name)
        if weight is None:
            continue
        for use in list(weight.uses()):
            _replace(graph, use.node, weight, form)
        del graph.initializers[name]
    model.graph.opset_imports[DOMAIN] = 1


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value, form: Form) -> None:
    assert weight.name is not None and weight.shape is not None  # noqa: PT018
    N, K = (int(size) for size in weight.shape.numpy())
    if K % BLOCK:
        raise GraphError(f"weight {weight.name} has {K} inputs, no multiple of {BLOCK}; it cannot be quantised in blocks")
    names, shapes = form.parts(weight.name), form.shapes(N, K)
    scales, *zeros = (
        _initializer(graph, name, dtype, shape)
        for name, dtype, shape in zip(names[1:], (weight.dtype, ir.DataType.UINT8), shapes[1:], strict=False)
    )
    attributes = {"bits": form.bits, "block_size": form.block_of(K)}
    if _is_linear(node, weight):
        q = _initializer(graph, names[0], ir.DataType.UINT8, shapes[0])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], q, scales, *zeros]
        inputs += [None] * (5 - len(inputs)) + [bias] if bias is not None else []
        attributes |= {"N": N, "K": K, "accuracy_level": ACCURACY_LEVEL}
        new = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name)
    elif (node.domain, node.op_type) == ("", "Gather") and node.inputs[0] is weight and not _number(node, "axis"):
        q = _initializer(graph, names[0] + ROWS, ir.DataType.UINT8, (N, K * form.bits // 8))
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
        new = ir.node("GatherBlockQuantized", [q, node.inputs[1], scales, *zeros], attributes, domain=DOMAIN, name=node.name)
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


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType | None, shape: Sequence[int]) -> ir.Value:
    if name not in graph.initializers:
        assert dtype is not None
        graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return graph.initializers[name]
