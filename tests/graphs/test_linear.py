"""What graphs/linear.py makes of linear layers, that it computes the same, and what it must leave alone."""

from __future__ import annotations

import harness
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphs.chain import chain_linears
from graphs.linear import fuse_linears

K, N = 37, 70
SHAPES = {
    "w": (N, K),
    "b": (N,),
    "down": (K, N),
    "one": (1, K),
    "wide": (1, N),
    "turned": (K, N),
    "norm": (K,),
    "square": (K, K),
    "scalar": (1,),
}  # by the first word
FEW, MANY = (1, 3, 24), (25, 70)  # rows: with kernels of ours, and with ONNX Runtime's


def graph(nodes: str, outputs: str = "y", inputs: str = "") -> ir.Model:
    """Of x [M,K], r [M,N] and weights that are called as SHAPES says, with or without a number: w, w1, w2, b1, …"""
    shown = ", ".join(f"float[] {name}" for name in outputs.split())
    text = f'<ir_version: 10, opset_import: ["": 24]> g (float[M,{K}] x, float[M,{N}] r{inputs}) => ({shown}) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    made = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    for name in sorted({name for node in model.graph.node for name in node.input if name} - made):
        array = rng.standard_normal(SHAPES[name.rstrip("0123456789")], np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    for value in model.graph.output:  # a name without a type; inference finds it
        value.ClearField("type")
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def fused(model: ir.Model, **others: tuple[int, ...]) -> list[str]:
    """The operators after fusing, which must compute what the graph before it did."""
    before = ir.to_proto(model)
    fuse_linears(model)
    chained = ir.from_proto(ir.to_proto(model))
    chain_linears(chained)
    after = ir.to_proto(chained)
    ours = any(node.domain for node in after.graph.node)
    sessions = [harness.ort_session(proto, own_operators=ours and proto is after) for proto in (before, after)]
    assert [value.name for value in after.graph.output] == [value.name for value in before.graph.output]
    rng = np.random.default_rng(1)
    for M in FEW + MANY:
        shapes = {"x": (M, K), "r": (M, N), **others}
        feeds = {value.name: rng.standard_normal(shapes[value.name], np.float32) for value in before.graph.input}
        for actual, expected in zip(*(session.run(None, feeds) for session in sessions), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)  # sums of 37 to 70 products of order 10
    return [node.op_type for node in model.graph]


GEMM = "Gemm<transB=1>"


def test_layers_of_one_input_are_one_node():
    three = f"q = {GEMM}(x, w1) k = {GEMM}(x, w2) v = {GEMM}(x, one)"
    model = graph(f"{three} a = Relu(q) b1 = Relu(k) c = Relu(v)", "a b1 c")
    assert fused(model) == ["Linear", "Relu", "Relu", "Relu"]
    (node,) = [node for node in model.graph if node.op_type == "Linear"]
    assert [value and value.name for value in node.inputs] == ["x", None, None, "w1", "w2", "one"]


def test_with_biases():
    model = graph(f"q = {GEMM}(x, w1, b1) k = {GEMM}(x, w2, b2) a = Relu(q) c = Relu(k)", "a c")
    assert fused(model) == ["Linear", "Relu", "Relu"]


def test_with_and_without_bias_apart():
    model = graph(f"q = {GEMM}(x, w1, b1) k = {GEMM}(x, w2) a = Relu(q) c = Relu(k)", "a c")
    assert sorted(fused(model)) == ["Linear", "Linear", "Relu", "Relu"]


@pytest.mark.parametrize("order", ["r, h", "h, r"])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_residual(order, bias):
    model = graph(f"h = {GEMM}(x, w{bias}) s = Add({order}) y = Relu(s)")
    assert fused(model) == ["Linear", "Relu"]


ACTIVATIONS = {
    "identity": "a = Identity(g)",
    "relu": "a = Relu(g)",
    "sigmoid": "a = Sigmoid(g)",
    "silu": "s = Sigmoid(g) a = Mul(g, s)",
    "silu turned": "s = Sigmoid(g) a = Mul(s, g)",
    "gelu": "a = Gelu(g)",
    "gelu_tanh": 'a = Gelu<approximate="tanh">(g)',
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biases", ["", "gate", "up", "gate up"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates(name, biases, turned):
    gate = f"g = {GEMM}(x, w1{', b1' if 'gate' in biases else ''})"
    up = f"u = {GEMM}(x, w2{', b2' if 'up' in biases else ''})"
    activation = ACTIVATIONS[name].replace("a = Identity(g)", "")
    acted = "a" if activation else "g"
    product = f"m = Mul({'u, ' + acted if turned else acted + ', u'})"
    model = graph(f"{gate} {up} {activation} {product} d = {GEMM}(m, down) y = Relu(d)")
    assert fused(model) == ["GatedLinear", "Linear", "Relu"]
    (node,) = [node for node in model.graph if node.op_type == "GatedLinear"]
    assert node.attributes["activation"].as_string() == name.removesuffix(" turned")


NORM = "n = RMSNormalization<epsilon=0.5>(x, norm)"


@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_norm_before_layers(bias):
    nodes = f"{NORM} h = {GEMM}(n, w1{bias}) k = {GEMM}(n, w2{bias}) a = Relu(h) c = Relu(k)"
    assert fused(graph(nodes, "a c")) == ["Linear", "Relu", "Relu"]
    assert fused(graph(f"{NORM} h = {GEMM}(n, w1{bias}) s = Add(h, r) y = Relu(s)")) == ["Linear", "Relu"]


@pytest.mark.parametrize("axis", ["", "<axis=-1>", "<axis=1>"])  # its epsilon is then 1e-5
def test_a_norm_before_a_gate(axis):
    gate = f"g = {GEMM}(n, w1) u = {GEMM}(n, w2, b2) s = Sigmoid(g) a = Mul(g, s) m = Mul(a, u) y = Relu(m)"
    assert fused(graph(f"n = RMSNormalization{axis}(x, norm) {gate}")) == ["GatedLinear", "Relu"]
    assert fused(graph(f"{NORM} {gate}")) == ["GatedLinear", "Relu"]


def test_a_norm_whose_weight_is_computed():
    nodes = f"t = Neg(norm) n = RMSNormalization(x, t) h = {GEMM}(n, w) y = Relu(h)"
    assert fused(graph(nodes)) == ["Neg", "RMSNormalization", "Linear", "Relu"]


def test_a_norm_that_others_use_as_well():
    nodes = f"{NORM} h = {GEMM}(n, w) y = Relu(h) z = Relu(n)"
    assert sorted(fused(graph(nodes, "y z"))) == ["Linear", "RMSNormalization", "Relu", "Relu"]


NORMS = {
    "over all axes": "n = RMSNormalization<axis=0>(x, scalar)",
    "whose weight broadcasts": "n = RMSNormalization(x, scalar)",
    "with the mean": "n = LayerNormalization(x, norm)",
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_that_stay(name):
    before, *_ = NORMS[name].removeprefix("n = ").partition("(")
    assert fused(graph(f"{NORMS[name]} h = {GEMM}(n, w) y = Relu(h)")) == [before.partition("<")[0], "Linear", "Relu"]


UNTOUCHED = {
    "alpha": "h = Gemm<transB=1, alpha=0.5>(x, w) y = Relu(h)",
    "beta": "h = Gemm<transB=1, beta=2.0>(x, w, b) y = Relu(h)",
    "weight not transposed": "h = Gemm(x, turned) y = Relu(h)",
    "input transposed": "t = Transpose<perm=[1,0]>(x) h = Gemm<transB=1, transA=1>(t, w) y = Relu(h)",
    "a bias that broadcasts": "h = Gemm<transB=1>(x, w, wide) y = Relu(h)",
    "a bias for each row": "h = Gemm<transB=1>(x, w, r) y = Relu(h)",
    "a weight that is computed": "t = Neg(w) h = Gemm<transB=1>(x, t) y = Relu(h)",
    "an output of the graph": "y = Gemm<transB=1>(x, w)",
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_gemms_that_are_left_alone(name):
    model = graph(UNTOUCHED[name])
    before = [node.op_type for node in model.graph]
    assert fused(model) == before


def test_an_output_of_the_graph_that_another_node_uses():
    model = graph(f"y = {GEMM}(x, w) s = Add(r, y) z = Relu(s)", "y z")
    assert fused(model) == ["Gemm", "Add", "Relu"]


def test_a_shared_up_projection_is_computed_once():
    nodes = f"g = {GEMM}(x, w1) u = {GEMM}(x, w2) a = Relu(g) m = Mul(a, u) n = Neg(u) s = Add(m, n) y = Relu(s)"
    assert fused(graph(nodes)) == ["Linear", "Linear", "Mul", "Neg", "Add", "Relu"]  # Relu is in the second


def test_a_layer_that_gates_itself():
    assert fused(graph(f"g = {GEMM}(x, w) a = Relu(g) m = Mul(a, g) y = Relu(m)")) == ["Linear", "Relu", "Mul", "Relu"]


def test_a_gate_and_an_up_projection_of_different_inputs():
    nodes = f"x2 = Neg(x) g = {GEMM}(x2, w1) u = {GEMM}(x, w2) a = Relu(g) m = Mul(a, u) y = Relu(m)"
    assert "GatedLinear" not in fused(graph(nodes))


def test_an_up_projection_that_broadcasts():
    nodes = f"g = {GEMM}(x, w1) u = {GEMM}(x, one) a = Relu(g) m = Mul(a, u) y = Relu(m)"
    assert "GatedLinear" not in fused(graph(nodes))


def test_a_product_that_is_an_output_of_the_graph():
    nodes = f"g = {GEMM}(x, w1) u = {GEMM}(x, w2) a = Relu(g) y = Mul(a, u)"
    assert fused(graph(nodes)) == ["Linear", "Linear", "Mul"]


@pytest.mark.parametrize("approximation", ["Elu", "Softplus", "Tanh"])
def test_an_activation_that_the_operator_lacks(approximation):
    nodes = f"g = {GEMM}(x, w1) u = {GEMM}(x, w2) a = {approximation}(g) m = Mul(a, u) y = Relu(m)"
    assert fused(graph(nodes)) == ["Linear", approximation, "Mul", "Relu"]


RESIDUALS = {
    "of one row": ("", "wide"),
    "that is a weight of one dimension": ("", "b"),
    "of one row, computed": (f", float[1,{N}] other", "other"),
    "of three dimensions": (f", float[2,1,{N}] other", "other"),
    "of one column": (", float[M2,1] other", "other"),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_residual_that_broadcasts(name):
    inputs, other = RESIDUALS[name]
    model = graph(f"h = {GEMM}(x, w) s = Add(h, {other}) y = Relu(s)", inputs=inputs)
    shape = {"of three dimensions": (2, 1, N), "of one column": (1, 1)}.get(name, (1, N))
    assert fused(model, **({"other": shape} if inputs else {})) == ["Linear", "Add", "Relu"]


def test_an_output_used_twice_keeps_its_residual_apart():
    assert fused(graph(f"h = {GEMM}(x, w) s = Add(r, h) t = Mul(s, h) y = Relu(t)")) == ["Linear", "Add", "Mul", "Relu"]


def test_a_sum_that_is_an_output_of_the_graph():
    assert fused(graph(f"h = {GEMM}(x, w) y = Add(r, h)")) == ["Linear", "Add"]


def test_a_layer_added_to_itself():
    assert fused(graph(f"h = {GEMM}(x, w) s = Add(h, h) y = Relu(s)")) == ["Linear", "Add", "Relu"]


def test_half_precision_is_left_alone():
    model = graph(f"h = {GEMM}(x, w) y = Relu(h)")
    model.graph.initializers["w"].dtype = ir.DataType.FLOAT16
    fuse_linears(model)
    assert [node.op_type for node in model.graph] == ["Gemm", "Relu"]
