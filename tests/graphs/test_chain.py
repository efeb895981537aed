"""What graphs/chain.py puts into one node, that it computes the same, and records that the operator must refuse."""

from __future__ import annotations

import harness
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_linear import GEMM, K, N, graph

from graphs.chain import chain_linears
from graphs.linear import fuse_linears

GATE = f"g = {GEMM}(n, w1) u = {GEMM}(n, w2) sg = Sigmoid(g) a = Mul(g, sg) m = Mul(a, u)"
NORM = "RMSNormalization<epsilon=0.5>"
# Attention's output, the residual stream: o, gate and up, down, the next layer's q and k.
BLOCK = f"""
    o = {GEMM}(x, square, norm3) h = Add(x2, o) n = {NORM}(h, norm) {GATE} d = {GEMM}(m, down) s = Add(h, d)
    n2 = {NORM}(s, norm2) q = {GEMM}(n2, w3, b3) k = {GEMM}(n2, one, scalar)
"""
STREAM = f", float[M,{K}] x2"


def chained(model: ir.Model) -> list[str]:
    """The operators after chaining, which must compute what the graph before it did."""
    before = ir.to_proto(model)
    fuse_linears(model)
    chain_linears(model)
    after = ir.to_proto(model)
    sessions = [harness.ort_session(proto, own_operators=proto is after, threads=2) for proto in (before, after)]
    rng = np.random.default_rng(1)
    for M in (1, 3, 24, 25, 70):
        feeds = {
            value.name: rng.standard_normal((M, N if value.name == "r" else K), np.float32) for value in before.graph.input
        }
        for actual, expected in zip(*(session.run(None, feeds) for session in sessions), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    return [node.op_type for node in after.graph.node]


def test_a_block_is_one_node():
    model = graph(f"{BLOCK} y = Relu(q) z = Relu(k) t = Relu(s)", "y z t", STREAM)
    assert chained(model) == ["LinearChain", "Relu", "Relu", "Relu"]
    (node,) = [node for node in model.graph if node.op_type == "LinearChain"]
    assert len(node.outputs) == 3  # what only the chain reads is none


def test_a_chain_that_reads_what_another_gives():
    nodes = f"p = {GEMM}(x, square) h = Add(x2, p) t = Neg(h) o = {GEMM}(t, square2) s = Add(h, o) y = Relu(s)"
    assert chained(graph(nodes, "y", STREAM)) == ["LinearChain", "Neg", "LinearChain", "Relu"]


def test_a_residual_that_is_not_there_when_the_chain_starts():
    """The second layer reads the first, but adds what was made of it by another node."""
    nodes = f"p = {GEMM}(x, square) t = Neg(p) o = {GEMM}(p, square2) s = Add(t, o) y = Relu(s)"
    assert chained(graph(nodes)) == ["LinearChain", "Neg", "LinearChain", "Relu"]


def test_a_value_that_the_chain_and_others_read():
    nodes = f"p = {GEMM}(x, square) o = {GEMM}(p, square2) y = Relu(o) z = Relu(p)"
    assert sorted(chained(graph(nodes, "y z"))) == ["LinearChain", "Relu", "Relu"]


@pytest.mark.parametrize("order", ["norm, c", "c, norm"])
def test_a_norm_with_an_offset(order):
    nodes = f"c = Constant<value_float=1.0>() f = Add({order}) n = {NORM}(x, f) h = {GEMM}(n, w) y = Relu(h)"
    model = graph(nodes)
    assert "RMSNormalization" not in chained(model)
    (node,) = [node for node in model.graph if node.op_type == "LinearChain"]
    assert list(node.attributes["offsets"].as_floats()) == [1.0]


def test_records_out_of_range_are_refused():
    """The library must not read beside its memory, whatever the file says."""
    model = graph(f"{BLOCK} y = Relu(q) z = Relu(k)", "y z", STREAM)
    fuse_linears(model)
    chain_linears(model)
    proto = ir.to_proto(model)
    (node,) = [node for node in proto.graph.node if node.op_type == "LinearChain"]
    feeds = {value.name: np.ones((3, N if value.name == "r" else K), np.float32) for value in proto.graph.input}
    assert 200 < harness.refusals(proto, node, (*["stages"] * 4, "outputs"), feeds, 300) < 300


@pytest.mark.parametrize("wrong", ["an output twice", "no inputs"])
def test_nodes_that_are_refused(wrong):
    model = graph(f"p = {GEMM}(x, square) o = {GEMM}(p, square2) y = Relu(o) z = Relu(p)", "y z")
    fuse_linears(model)
    chain_linears(model)
    proto = ir.to_proto(model)
    (node,) = [node for node in proto.graph.node if node.op_type == "LinearChain"]
    if wrong == "an output twice":
        (attribute,) = [attribute for attribute in node.attribute if attribute.name == "outputs"]
        attribute.CopyFrom(onnx.helper.make_attribute("outputs", [attribute.ints[0]] * 2))
    for weight in proto.graph.initializer:
        if wrong == "no inputs":
            weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((K, 0), np.float32), weight.name))
    with pytest.raises(Exception, match=r"headpool::LinearChain: (an output is given twice|the weights of a stage contradict)"):
        harness.ort_session(proto, own_operators=True)
