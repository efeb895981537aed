"""The linear layers of a graph become headpool's operators: fewer, larger nodes that read weights at the memory's speed.

Linear       x [M,K], residual [M,N], norm [K] (both optional), w_1 [N_1,K], …, and with the attribute `bias` b_1 [N_1], … →
             y_i = x · w_iᵀ + b_i (+ residual, where there is one output). Layers of one input become one node: Q, K and V.
GatedLinear  x [M,K], gate [N,K], up [N,K], gate_bias [N], up_bias [N], norm [K] (all three optional) →
             act(x · gateᵀ) ⊙ (x · upᵀ), `activation` one of identity, relu, silu, sigmoid, gelu, gelu_tanh.

Where there is a norm, x is first RMS-normalised with it and the attribute `epsilon`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphs.canonical import DOMAIN
from graphs.stamp import tidy

ACTIVATIONS = {"Sigmoid": "sigmoid", "Relu": "relu", "Gelu": "gelu"}


@dataclass(frozen=True)
class _Layer:
    """Gemm(x, w, bias) with w [N,K] and bias [N] weights of the graph, whose output is not the graph's."""

    node: ir.Node
    x: ir.Value
    w: ir.Value
    bias: ir.Value | None

    @property
    def y(self) -> ir.Value:
        return self.node.outputs[0]


def fuse_linears(model: ir.Model) -> None:
    """Rewrite `model` in place. Nodes that do not fit are left as they are."""
    graph = model.graph
    for node in list(graph):
        _gate(graph, node)
    tidy(model)  # the layers that a gate took over are gone now
    by_input: dict[tuple[ir.Value, bool], list[_Layer]] = {}
    for node in graph:
        if (layer := _layer(node.outputs[0])) is not None:
            by_input.setdefault((layer.x, layer.bias is None), []).append(layer)
    for layers in by_input.values():
        _merge(graph, layers)
    tidy(model)


def _layer(value: ir.Value | None) -> _Layer | None:
    node = value.producer() if value is not None else None
    if node is None or (node.domain, node.op_type) != ("", "Gemm"):
        return None
    numbers = {name: attribute.value for name, attribute in node.attributes.items()}
    scales = (numbers.get("alpha", 1.0), numbers.get("beta", 1.0))
    plain = scales == (1, 1) and numbers.get("transB") and not numbers.get("transA")
    x, w, bias = (*node.inputs, None)[:3]
    if not plain or x is None or w is None or not w.is_initializer() or w.dtype != ir.DataType.FLOAT or w.shape is None:
        return None
    if bias is not None and not (bias.is_initializer() and bias.shape == w.shape[:1]):  # Gemm would broadcast another shape
        return None
    return None if node.outputs[0].is_graph_output() else _Layer(node, x, w, bias)


def _gate(graph: ir.Graph, node: ir.Node) -> None:
    """Mul(act(gate), up) → GatedLinear."""
    if (node.domain, node.op_type) != ("", "Mul") or node.outputs[0].is_graph_output():
        return
    for first, second in (node.inputs, reversed(node.inputs)):
        up, (source, activation) = _layer(second), _activation(first)
        gate = _layer(source)
        if gate is None or up is None or gate.x is not up.x or gate.node is up.node or len(up.y.uses()) > 1:
            continue
        if gate.w.shape != up.w.shape:  # Mul would broadcast
            continue
        x, norm, epsilon = _normed(gate.x)
        inputs = [x, gate.w, up.w, gate.bias, up.bias, norm]
        (y,) = _insert(graph, node, node.name or "", "GatedLinear", inputs, activation=activation, epsilon=epsilon)
        _take_over(graph, node.outputs[0], y)
        return


def _activation(value: ir.Value | None) -> tuple[ir.Value | None, str]:
    """What the activation is applied to, and its name."""
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return value, "identity"
    if node.op_type in ACTIVATIONS:
        approximate = node.attributes.get("approximate")
        tanh = approximate is not None and approximate.as_string() == "tanh"
        return node.inputs[0], "gelu_tanh" if tanh else ACTIVATIONS[node.op_type]
    if node.op_type == "Mul":
        for x, sigmoid in (node.inputs, reversed(node.inputs)):
            producer = sigmoid.producer() if sigmoid is not None else None
            if producer is not None and producer.op_type == "Sigmoid" and producer.inputs[0] is x:
                return x, "silu"
    return value, "identity"


def _merge(graph: ir.Graph, layers: Sequence[_Layer]) -> None:
    """Layers of one input, all with or all without bias → one Linear; a single one takes the residual added to it along."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    residual, add = _residual(layers[0]) if len(layers) == 1 else (None, None)
    anchor = add or layers[0].node
    x, norm, epsilon = _normed(layers[0].x)
    inputs = [x, residual, norm, *(layer.w for layer in layers), *biases]
    name = layers[0].node.name or ""
    outputs = _insert(graph, anchor, name, "Linear", inputs, outputs=len(layers), bias=int(bool(biases)), epsilon=epsilon)
    for old, new in zip([add.outputs[0]] if add else [layer.y for layer in layers], outputs, strict=True):
        _take_over(graph, old, new)


def _normed(x: ir.Value) -> tuple[ir.Value, ir.Value | None, float]:
    """The input, weight and epsilon of the RMSNormalization that gives `x`; `x` itself and no weight where none does."""
    node = x.producer()
    if node is None or (node.domain, node.op_type) != ("", "RMSNormalization") or x.dtype not in (None, ir.DataType.FLOAT):
        return x, None, 0.0
    source, weight = node.inputs[:2]
    axis, epsilon = node.attributes.get("axis"), node.attributes.get("epsilon")
    if source is None or source.shape is None or weight is None or (axis is not None and axis.as_int() not in (-1, 1)):
        return x, None, 0.0
    if len(source.shape) != 2 or weight.shape is None or weight.shape != source.shape[1:]:  # the last: it would broadcast
        return x, None, 0.0
    return source, weight, 1e-5 if epsilon is None else epsilon.as_float()


def _residual(layer: _Layer) -> tuple[ir.Value | None, ir.Node | None]:
    """r and the node of Add(r, y), where that is all y is used for and r has y's shape [M,N] and is no weight."""
    uses = list(layer.y.uses())
    node = uses[0].node if len(uses) == 1 else None
    if node is None or (node.domain, node.op_type) != ("", "Add") or node.outputs[0].is_graph_output():
        return None, None
    other = node.inputs[1] if node.inputs[0] is layer.y else node.inputs[0]
    assert layer.w.shape is not None
    if other is None or other.const_value is not None or other.is_initializer() or other.shape is None:
        return None, None
    rows = {shape[0] for shape in (other.shape, layer.y.shape or [None])}
    broadcast = len(other.shape) != 2 or other.shape[1] != layer.w.shape[0] or (1 in rows and len(rows) > 1)
    return (None, None) if broadcast else (other, node)


def _insert(
    graph: ir.Graph,
    anchor: ir.Node,
    like: str,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: int = 1,
    **attributes: Any,
) -> Sequence[ir.Value]:
    """A node before `anchor`, named in the scope of the node called `like`."""
    scope = like.rsplit("/", 1)[0]
    node = ir.node(op_type, inputs, attributes, domain=DOMAIN, num_outputs=outputs, name=f"{scope}/{op_type}")
    for index, value in enumerate(node.outputs):
        value.name = f"{node.name}:{index}"
    graph.insert_before(anchor, node)
    return node.outputs


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new)
    node = old.producer()
    assert node is not None
    graph.remove(node, safe=True)
