"""The linear layers of a graph become fewer, larger nodes, with the norms, activations and sums around them.

Linear       x [M,K], residual [M,N], norm [K] (both optional), w_1 [N_1,K], …, and with biases b_1 [N_1], … →
             y_i = x · w_iᵀ + b_i (+ residual, where there is one output). Layers of one input become one node: Q, K and V.
             With the attribute `activation` it is act(y) of its one layer: an FFN that is not gated.
GatedLinear  x [M,K], gate [N,K], up [N,K], gate_bias [N], up_bias [N], norm [K] (all three optional) →
             act(x · gateᵀ) ⊙ (x · upᵀ), `activation` one of identity, relu, silu, sigmoid, gelu, gelu_tanh.

Where there is a norm, x is first RMS-normalised with the attribute `epsilon` and norm + the attribute `offset`. All weights are
the graph's own. With the attribute `bits` above 0 they are quantised (graphs/quantise.py): q stands for w, and the scales of
all layers follow after all the w of a Linear and at the end of a GatedLinear.

graphs/chain.py makes of these nodes the operator that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphs import quantise
from graphs.canonical import DOMAIN
from graphs.stamp import tidy

ACTIVATIONS = {"Sigmoid": "sigmoid", "Relu": "relu", "Gelu": "gelu"}


@dataclass(frozen=True)
class _Layer:
    """Gemm(x, w, bias) with w [N,K] and bias [N] weights of the graph, whose output is not the graph's.

    Or MatMulNBits(x, w, scales, bias): then w is q, and `bits` above 0.
    """

    node: ir.Node
    x: ir.Value
    w: ir.Value
    bias: ir.Value | None
    scales: ir.Value | None = None
    bits: int = 0

    @property
    def y(self) -> ir.Value:
        return self.node.outputs[0]


def fuse_linears(model: ir.Model) -> None:
    """Rewrite `model` in place. Nodes that do not fit are left as they are."""
    graph = model.graph
    for fuse in (_gate, _activate):
        for node in list(graph):
            fuse(graph, node)
        tidy(model)  # the layers that were taken over are gone now
    by_input: dict[tuple[ir.Value, bool, int], list[ir.Node]] = {}
    for node in graph:
        if (layer := _layer(node.outputs[0])) is not None:
            by_input.setdefault((layer.x, layer.bias is None, layer.bits), []).append(node)
    for nodes in by_input.values():  # looked at anew: what gave x may have been replaced
        _merge(graph, [layer for node in nodes if (layer := _layer(node.outputs[0]))])
    tidy(model)


def _layer(value: ir.Value | None) -> _Layer | None:
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == (quantise.DOMAIN, "MatMulNBits"):
        return _quantised_layer(node)
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


def _quantised_layer(node: ir.Node) -> _Layer | None:
    x, w, scales, zero_points, order, bias = (*node.inputs, None, None, None)[:6]
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    if x is None or x.dtype not in (None, ir.DataType.FLOAT) or zero_points is not None or order is not None:
        return None
    if w is None or scales is None or scales.dtype != ir.DataType.FLOAT or block != quantise.BLOCK:
        return None
    return None if node.outputs[0].is_graph_output() else _Layer(node, x, w, bias, scales, bits)


def _gate(graph: ir.Graph, node: ir.Node) -> None:
    """Mul(act(gate), up) → GatedLinear."""
    if (node.domain, node.op_type) != ("", "Mul") or node.outputs[0].is_graph_output():
        return
    for first, second in (node.inputs, reversed(node.inputs)):
        up, (source, activation) = _layer(second), _activation(first)
        gate = _layer(source)
        if gate is None or up is None or gate.x is not up.x or gate.node is up.node or len(up.y.uses()) > 1:
            continue
        if gate.w.shape != up.w.shape or gate.bits != up.bits:  # Mul would broadcast
            continue
        norm = _normed(gate.x)
        inputs = [norm.x, gate.w, up.w, gate.bias, up.bias, norm.weight, *([gate.scales, up.scales] if gate.bits else [])]
        attributes = {"activation": activation, "bits": gate.bits, **norm.attributes}
        (y,) = insert(graph, node, node.name, "GatedLinear", inputs, **attributes)
        take_over(node.outputs[0], y)
        graph.remove(node, safe=True)
        return


def _activate(graph: ir.Graph, node: ir.Node) -> None:
    """act(linear) → Linear with an activation."""
    if node.op_type not in (*ACTIVATIONS, "Mul") or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return
    source, activation = _activation(node.outputs[0])
    layer = _layer(source)
    own = {node, *_sigmoids(node)}
    if activation == "identity" or layer is None or any(use.node not in own for use in layer.y.uses()):
        return
    norm = _normed(layer.x)
    inputs = [norm.x, None, norm.weight, layer.w, *(v for v in (layer.scales, layer.bias) if v is not None)]
    attributes = {"activation": activation, "bits": layer.bits, **norm.attributes}
    (y,) = insert(graph, node, layer.node.name, "Linear", inputs, **attributes)
    take_over(node.outputs[0], y)
    graph.remove(node, safe=True)


def _sigmoids(node: ir.Node) -> list[ir.Node]:
    """What makes the inputs of a Mul, where that is a Sigmoid."""
    producers = [value.producer() for value in node.inputs if value is not None]
    return [producer for producer in producers if producer is not None and producer.op_type == "Sigmoid"]


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
    """Layers of one input and number of bits, all with or all without bias → one Linear; a single one takes the residual
    that is added to it along."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    residual, add = _residual(layers[0]) if len(layers) == 1 else (None, None)
    anchor = add or layers[0].node
    norm, name = _normed(layers[0].x), layers[0].node.name
    scales = [layer.scales for layer in layers if layer.scales is not None]
    inputs = [norm.x, residual, norm.weight, *(layer.w for layer in layers), *scales, *biases]
    outputs = insert(graph, anchor, name, "Linear", inputs, len(layers), bits=layers[0].bits, **norm.attributes)
    for old, new in zip([add] if add else [layer.node for layer in layers], outputs, strict=True):
        take_over(old.outputs[0], new)
        graph.remove(old, safe=True)


@dataclass(frozen=True)
class _Norm:
    """x, RMS-normalised with weight + offset; x itself where there is no weight."""

    x: ir.Value
    weight: ir.Value | None = None
    epsilon: float = 0.0
    offset: float = 0.0

    @property
    def attributes(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "offset": self.offset}


def _normed(x: ir.Value) -> _Norm:
    """What gives `x`, where that is an RMSNormalization that fits."""
    node = x.producer()
    if node is None or (node.domain, node.op_type) != ("", "RMSNormalization") or x.dtype not in (None, ir.DataType.FLOAT):
        return _Norm(x)
    (source, weight), axis, epsilon = node.inputs[:2], node.attributes.get("axis"), node.attributes.get("epsilon")
    weight, offset = _without_offset(weight)
    if source is None or source.shape is None or (axis is not None and axis.as_int() not in (-1, 1)):
        return _Norm(x)
    if len(source.shape) != 2 or weight is None or weight.shape != source.shape[1:]:  # it would broadcast
        return _Norm(x)
    return _Norm(source, weight, 1e-5 if epsilon is None else epsilon.as_float(), offset)


def _without_offset(weight: ir.Value | None) -> tuple[ir.Value | None, float]:
    """w and c of w + c (Gemma has 1 + w), w a weight of the graph; no w where it is something else."""
    if weight is None or weight.is_initializer():
        return weight, 0.0
    node = weight.producer()
    if node is None or (node.domain, node.op_type) != ("", "Add"):
        return None, 0.0
    for w, constant in (node.inputs, reversed(node.inputs)):
        number = _number(constant)
        if number is not None and w is not None and w.is_initializer() and w.shape == weight.shape:
            return w, number
    return None, 0.0


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element, cast or not."""
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == ("", "Cast"):
        value = node.inputs[0]
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def _residual(layer: _Layer) -> tuple[ir.Value | None, ir.Node | None]:
    """r and the node of Add(r, y), where that is all y is used for and r has y's shape [M,N] and is no weight."""
    uses = list(layer.y.uses())
    node = uses[0].node if len(uses) == 1 else None
    if node is None or (node.domain, node.op_type) != ("", "Add") or node.outputs[0].is_graph_output():
        return None, None
    other = node.inputs[1] if node.inputs[0] is layer.y else node.inputs[0]
    assert layer.w.shape is not None  # [N,…], quantised or not
    if other is None or other.const_value is not None or other.is_initializer() or other.shape is None:
        return None, None
    rows = {shape[0] for shape in (other.shape, layer.y.shape or [None])}
    broadcast = len(other.shape) != 2 or other.shape[1] != layer.w.shape[0] or (1 in rows and len(rows) > 1)
    return (None, None) if broadcast else (other, node)


@dataclass(frozen=True)
class Stage:
    """A Linear or a GatedLinear, taken apart. `activation` is of the first of its two layers, which gates the other, or of its
    only one."""

    x: ir.Value
    residual: ir.Value | None
    norm: ir.Value | None
    epsilon: float
    offset: float
    activation: str | None
    bits: int
    w: tuple[ir.Value, ...]
    scales: tuple[ir.Value | None, ...]
    bias: tuple[ir.Value | None, ...]


def stage_of(node: ir.Node) -> Stage | None:
    """None for any other node."""
    if node.domain != DOMAIN or node.op_type not in ("Linear", "GatedLinear"):
        return None
    inputs = list(node.inputs)
    epsilon, offset = (node.attributes[name].as_float() for name in ("epsilon", "offset"))
    bits = node.attributes["bits"].as_int()
    if node.op_type == "GatedLinear":
        gate_bias, up_bias, norm, *rest = (*inputs[3:], *[None] * 5)[:5]
        x, gate, up = (value for value in inputs[:3] if value is not None)
        gated = node.attributes["activation"].as_string()
        return Stage(x, None, norm, epsilon, offset, gated, bits, (gate, up), tuple(rest), (gate_bias, up_bias))
    first, residual, norm, *weights = inputs
    count = len(node.outputs)
    w, rest = [value for value in weights[:count] if value is not None], weights[count:]
    scales, biases = (rest[:count], rest[count:]) if bits else ([None] * count, rest)
    assert first is not None
    activation = node.attributes["activation"].as_string() if "activation" in node.attributes else None
    bias = tuple(biases or [None] * count)
    return Stage(first, residual, norm, epsilon, offset, activation, bits, tuple(w), tuple(scales), bias)


def insert(
    graph: ir.Graph,
    anchor: ir.Node,
    like: str | None,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    count: int = 1,
    **attributes: Any,
) -> Sequence[ir.Value]:
    """The outputs, `count` of them, of a new node before `anchor`, named in the scope of the node called `like`."""
    scope = (like or "").rsplit("/", 1)[0]
    node = ir.node(op_type, inputs, attributes, domain=DOMAIN, num_outputs=count, name=f"{scope}/{op_type}")
    for index, value in enumerate(node.outputs):
        value.name = f"{node.name}:{index}"
    graph.insert_before(anchor, node)
    return node.outputs


def take_over(old: ir.Value, new: ir.Value) -> None:
    """All that used `old` uses `new`."""
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new)
