"""Compose one graph out of traced parts: copy a part's nodes under a prefix, as often as it is needed.

A part is a small ONNX model. Its inputs are given as values of the growing graph; its initialisers become initialisers called
`prefix.name`; its nodes and values get hierarchical names, `/model/layers.3/self_attn/q_proj/Gemm`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes


class Stamper:
    """The graph being composed."""

    def __init__(self, inputs: Iterable[ir.Value], opset: int, domains: Mapping[str, int]) -> None:
        self.inputs = list(inputs)
        self.opsets = {"": opset, **domains}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._names: dict[str, int] = {}

    def initializer(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """The initialiser called `name`, made without a value where it is not there yet."""
        if name not in self.initializers:
            self.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        return self.initializers[name]

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initialiser with `tensor`'s value; equal constants share one."""
        name = constant_name(tensor)
        if name not in self.initializers:
            value = self.initializer(name, tensor.dtype, tensor.shape.numpy())
            value.const_value = tensor
        return self.initializers[name]

    def stamp(self, part: ir.Model, prefix: str, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Copy `part` under `prefix`; returns its outputs as values of this graph."""
        graph = part.graph
        assert len(graph.inputs) == len(inputs), (prefix, [v.name for v in graph.inputs], [v.name for v in inputs])
        values: dict[ir.Value, ir.Value] = dict(zip(graph.inputs, inputs, strict=True))
        for name, value in graph.initializers.items():
            assert value.dtype is not None
            assert value.shape is not None
            values[value] = self.initializer(f"{prefix}.{name}", value.dtype, value.shape.numpy())
        for node in graph:
            if node.op_type == "Constant" and node.domain == "":
                values[node.outputs[0]] = self.constant(constant_of(node))
            elif (shape := _constant_shape(node, values)) is not None:
                values[node.outputs[0]] = self.constant(shape)
            else:
                self.nodes.append(self._copy(node, prefix, values))
        return [values[value] for value in graph.outputs]

    def _copy(self, node: ir.Node, prefix: str, values: dict[ir.Value, ir.Value]) -> ir.Node:
        name = self._unique("/" + prefix.replace(".", "/", 1) + scope(node) + "/" + node.op_type)
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else values[value] for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=name,
        )
        for index, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name = f"{name}:{index}"
            new.type = old.type
            new.shape = known_dims(old.shape)
            values[old] = new
        return copy

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def finish(self, outputs: Sequence[ir.Value], name: str) -> ir.Model:
        """The composed model, without duplicate or dead nodes."""
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=self.opsets,
            name=name,
        )
        model = ir.Model(graph, ir_version=11, producer_name="headpool")
        tidy(model)
        return model


def scope(node: ir.Node) -> str:
    """The torch module path a traced node came from, as "/self_attn/q_proj"; empty at the part's top."""
    path = node.metadata_props.get("namespace", "")
    parts = [part.split(":", 1)[0].strip() for part in path.split("/")]
    inner = [part for part in parts[:-1] if part and not part.startswith("_")]  # the last part is the operator
    return f"/{inner[-1].replace('.', '/')}" if inner else ""


def constant_of(node: ir.Node) -> ir.TensorProtocol:
    """The tensor of a Constant node, whichever of its attributes holds it."""
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        return attribute.as_tensor()
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return ir.tensor(np.array(attribute.value, dtype=kinds[attribute.name]))


def _constant_shape(node: ir.Node, values: Mapping[ir.Value, ir.Value]) -> ir.TensorProtocol | None:
    """What a Concat of constants gives: a Reshape target that torch wrote in pieces."""
    if node.op_type != "Concat":
        return None
    parts = [values[value].const_value for value in node.inputs if value is not None]
    arrays = [part.numpy() for part in parts if part is not None]
    return ir.tensor(np.concatenate(arrays)) if len(arrays) == len(node.inputs) else None


def constant_name(tensor: ir.TensorProtocol) -> str:
    """A name that equal constants share and others do not: dtype, shape and values (or their hash)."""
    array = tensor.numpy()
    text = ",".join(map(str, array.reshape(-1))) if array.size <= 8 else hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return f"constant/{tensor.dtype.name.lower()}[{'x'.join(map(str, array.shape))}]({text})"


def known_dims(shape: ir.Shape | None) -> ir.Shape | None:
    """The shape with its numbers kept and the part's own symbols dropped: they mean nothing in another graph."""
    if shape is None:
        return None
    return ir.Shape([dim if isinstance(dim, int) else None for dim in shape])


def tidy(model: ir.Model) -> None:
    """Shared shape arithmetic once, nothing unused."""
    passes.CommonSubexpressionEliminationPass()(model)
    fuse_reshapes(model.graph)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def fuse_reshapes(graph: ir.Graph) -> None:
    """Reshape(Reshape(x, a), b) → Reshape(x, b), where b is constant and copies no dimension of its input (has no 0), and
    Reshape(Squeeze(Shape(x)), [−1]) → Shape(x)."""
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        inner, target = node.inputs[0].producer(), node.inputs[1].const_value
        if inner is None or target is None or 0 in target.numpy():
            continue
        if inner.op_type == "Reshape":
            node.replace_input_with(0, inner.inputs[0])
        elif inner.op_type == "Squeeze" and target.numpy().tolist() == [-1] and (sizes := _sizes(inner.inputs[0])):
            node.outputs[0].replace_all_uses_with(sizes)


def _sizes(value: ir.Value | None) -> ir.Value | None:
    """`value`, where a Shape gives it, which always has one dimension."""
    producer = value.producer() if value is not None else None
    return value if producer is not None and producer.op_type == "Shape" else None
