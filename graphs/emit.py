"""Emit nodes while a canonical node is rewritten: names under the node they replace, equal constants shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.stamp import constant_name

LOWEST = {ir.DataType.FLOAT: -(2.0**126), ir.DataType.FLOAT16: -(2.0**14), ir.DataType.BFLOAT16: -(2.0**126)}


class Emitter:
    """Nodes for one graph, inserted before `anchor`, called `scope`/name."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.anchor: ir.Node | None = None
        self.scope = ""
        self.shared: dict[Any, ir.Value] = {}  # values that every layer uses: the mask, sequence lengths

    def at(self, node: ir.Node) -> None:
        """From here on, emit before `node` and under its name's scope."""
        self.anchor, self.scope = node, (node.name or "").rsplit("/", 1)[0]

    def op(
        self, name: str, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """One node called `scope`/`name`; its output, or a tuple of them."""
        assert self.anchor is not None
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=f"{self.scope}/{name}")
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}:{index}"
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, values: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """An initialiser, shared by all equal constants of the graph."""
        tensor = ir.tensor(np.asarray(values, dtype=dtype.numpy()), dtype=dtype)
        name = constant_name(tensor)
        if name not in self.graph.initializers:
            value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def lowest(self, dtype: ir.DataType) -> ir.Value:
        """What hides a score: finite, so that a row which sees nothing does not become NaN, and far below any real score.

        A score added to it stays finite in its dtype too.
        """
        return self.constant(LOWEST[dtype], dtype)
