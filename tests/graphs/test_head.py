"""The output head in one node: of the last tokens and of all, that it computes the same, and what is left as it is."""

from __future__ import annotations

import harness
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_linear import GEMM, SHAPES, K, N

from graphs.chain import HEAD, chain_linears
from graphs.linear import fuse_linears

NORM = "RMSNormalization<epsilon=0.5>"
SIZES = """b = Shape<start=0, end=1>(ids) t = Shape<start=1, end=2>(ids)
    flat = Constant<value_ints=[-1]>() one = Constant<value_ints=[1]>() back = Constant<value_int=-1>()"""
APART = "whole = Concat<axis=0>(b, t, flat) apart = Reshape(s, whole)"
STREAM = f"p = {GEMM}(x, square) s = Add(x, p)"
LAST = f"""{STREAM} {SIZES} {APART} h = Gather<axis=1>(apart, back) n = {NORM}(h, norm) y = {GEMM}(n, w)
    target = Concat<axis=0>(b, one, flat) logits = Reshape(y, target)"""
ALL = f"{STREAM} {SIZES} n = {NORM}(s, norm) y = {GEMM}(n, w) target = Concat<axis=0>(b, t, flat) logits = Reshape(y, target)"


def graph(nodes: str, last: bool) -> ir.Model:
    """Of ids [B,T] and x [B·T,K], as test_linear.py's."""
    T = 1 if last else "T"
    text = f"""<ir_version: 10, opset_import: ["": 24]>
        g (int64[B,T] ids, int64[B,T] others, float[rows,{K}] x) => (float[B,{T},{N}] logits) {{ {nodes} }}"""
    model = onnx.parser.parse_model(text)
    rng, made = np.random.default_rng(0), {"ids", "others", "x", *(name for node in model.graph.node for name in node.output)}
    for name in sorted({name for node in model.graph.node for name in node.input} - made):
        array = rng.standard_normal(SHAPES[name.rstrip("0123456789")], np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    for name, shape in {"apart": ["B", "T", K], "h": ["B", K], "n": ["B" if last else "rows", K]}.items():  # as exports say
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def tokens(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.int64) for name in ("ids", "others")}


def chained(model: ir.Model, sizes: tuple[tuple[int, int], ...] = ((1, 1), (3, 1), (2, 5), (1, 70), (30, 2))) -> list[str]:
    """The operators after chaining, which must compute what the graph before it did."""
    before = ir.to_proto(model)
    fuse_linears(model)
    chain_linears(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(before))
    sessions = [harness.ort_session(proto, own_operators=proto is after, threads=2) for proto in (before, after)]
    rng = np.random.default_rng(1)
    for B, T in sizes:
        feeds = tokens((B, T)) | {"x": rng.standard_normal((B * T, K), np.float32)}
        expected, actual = (session.run(["logits"], feeds)[0] for session in sessions)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(initial=0.0))
    return [node.op_type for node in after.graph.node]


def test_the_last_tokens():
    assert chained(graph(LAST, last=True)) == ["LinearChain", "LinearChain"]


def test_all_tokens():
    assert chained(graph(ALL, last=False)) == ["LinearChain", "LinearChain"]


@pytest.mark.parametrize("last", [False, True])
def test_no_tokens(last):
    model = graph(LAST if last else ALL, last)
    fuse_linears(model)
    chain_linears(model)
    session = harness.ort_session(ir.to_proto(model), own_operators=True)
    feeds = tokens((2, 0)) | {"x": np.zeros((0, K), np.float32)}
    if not last:
        assert session.run(None, feeds)[0].shape == (2, 0, N)
        return
    with pytest.raises(Exception, match="LinearChain: x does not fit the tokens"):
        session.run(None, feeds)


@pytest.mark.parametrize(
    ("nodes", "old", "new"),
    [
        (LAST, "value_int=-1", "value_int=0"),  # the first token
        (LAST, "t = Shape<start=1, end=2>(ids)", "t = Shape<start=1, end=2>(others)"),
        (LAST, "h = Gather<axis=1>(apart, back)", "g = Gather<axis=1>(apart, back) h = Neg(g)"),
        (ALL, "logits = Reshape(y, target)", "u = Neg(y) logits = Reshape(u, target)"),
        (ALL, "logits = Reshape(y, target)", "u = Reshape(y, target) logits = Neg(u)"),
    ],
)
def test_what_is_no_head(nodes, old, new):
    assert old in nodes
    assert "Reshape" in chained(graph(nodes.replace(old, new), nodes is LAST), ((1, 1), (3, 1), (2, 5)))


@pytest.mark.parametrize("nodes", [LAST, ALL], ids=["last", "all"])
def test_records_out_of_range_are_refused(nodes):
    """The library must not read beside its memory, whatever the file says."""
    model = graph(nodes, nodes is LAST)
    fuse_linears(model)
    chain_linears(model)
    proto = ir.to_proto(model)
    node = proto.graph.node[-1]
    assert next(attribute.ints[0] for attribute in node.attribute if attribute.name == "stages") == HEAD
    feeds = tokens((2, 3)) | {"x": np.ones((6, K), np.float32)}
    assert 75 < harness.refusals(proto, node, ("stages",), feeds, 150) < 150


@pytest.mark.parametrize(("shape", "rows"), [((2, 3), 5), ((6,), 6), ((2, 3, 1), 6), ((3, 3), 6)])
def test_tokens_of_another_shape(shape, rows):
    model = graph(LAST, last=True)
    fuse_linears(model)
    chain_linears(model)
    for value in model.graph.inputs:
        if value.name in ("ids", "others"):
            value.shape = ir.Shape([None] * len(shape))
    session = harness.ort_session(ir.to_proto(model), own_operators=True)
    with pytest.raises(Exception, match="LinearChain: x does not fit the tokens"):
        session.run(None, tokens(shape) | {"x": np.ones((rows, K), np.float32)})
