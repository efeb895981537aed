"""headpool::FusedAttention with a bias, and over a cache that it only reads, against the grouped lowering."""

from __future__ import annotations

import harness
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.canonical import DOMAIN, OP_TYPE, standalone
from graphs.lower import lower

TOLERANCE = 5e-5  # absolute, of outputs of order 1


def reader(H: int, G: int, D: int, Dv: int, biased: bool) -> ir.Model:
    """One canonical node that only reads: cross-attention, or an encoder's."""
    data, whole = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
    shapes = {"query": ["B", "T", H * D], "past_key": ["B", G, "S", D], "past_value": ["B", G, "S", Dv]}
    query, key, value = (ir.Value(name=name, shape=ir.Shape(shape), type=data) for name, shape in shapes.items())
    mask = ir.Value(name="attention_mask", shape=ir.Shape(["B", "S"]), type=whole)
    bias = ir.Value(name="bias", shape=ir.Shape([1, H, "T", "S"]), type=data) if biased else None
    inputs = [query, None, None, key, value, None, mask, bias]
    attributes = {"num_heads": H, "kv_num_heads": G, "scale": 0.5}
    node = ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, num_outputs=3, name="/attention/GroupedAttention")
    output = node.outputs[0]
    output.name, output.type, output.shape = "output", data, ir.Shape(["B", "T", H * Dv])
    given_ones = [value for value in inputs if value is not None]
    return ir.Model(ir.Graph(given_ones, [output], nodes=[node], opset_imports={"": 24, DOMAIN: 1}), ir_version=11)


def both(model: ir.Model, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of `fused` and of `grouped`."""
    fused, grouped = (
        harness.ort_session(ir.to_proto(lower(model, pattern)), own_operators=pattern == "fused", threads=2)
        for pattern in ("fused", "grouped")
    )
    return fused.run(["output"], feeds)[0], grouped.run(["output"], feeds)[0]


HEADS = st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from([8, 12, 64]), st.sampled_from([8, 20, 64]))
ROWS = st.sampled_from([1, 17, 64, 130, 1500])


@settings(max_examples=40, deadline=None)
@given(HEADS, st.integers(1, 3), st.sampled_from([1, 2, 5, 70]), ROWS, st.booleans(), st.integers(0, 99))
def test_a_cache_that_is_only_read(heads, B, T, S, biased, seed):
    """Masked rows, and in the last sequence all but one; a bias of every head and token, or none."""
    (G, R, D, Dv), rng = heads, np.random.default_rng(seed)
    H = G * R
    mask = rng.integers(0, 2, (B, S))
    mask[-1], mask[:, 0] = 0, 1
    shapes = {"query": (B, T, H * D), "past_key": (B, G, S, D), "past_value": (B, G, S, Dv)}
    shapes |= {"bias": (1, H, T, S)} if biased else {}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} | {"attention_mask": mask}
    output, expected = both(reader(H, G, D, Dv, biased), feeds)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(HEADS, st.sampled_from([1, 2, 5, 70]), ROWS, st.integers(0, 99))
def test_a_bias_over_a_cache_of_its_own(heads, T, S, seed):
    (G, R, D, Dv), rng, B = heads, np.random.default_rng(seed), 2
    H, S = G * R, S + T
    starts = rng.integers(0, S - T + 1, B)
    shapes = {"query": (B, T, H * D), "key": (B, T, G * D), "value": (B, T, G * Dv), "bias": (1, H, T, S)}
    shapes |= {"past_key": (B, G, S, D), "past_value": (B, G, S, Dv)}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    feeds["position_ids"] = starts[:, None] + np.arange(T)
    output, expected = both(standalone(H, G, D, value_dim=Dv, biased=True), feeds)
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 4, 3, 9), (2, 4, 3, 8), (1, 3, 3, 8), (1, 4, 2, 8), (0, 4, 3, 8)])
def test_a_bias_of_another_shape(shape):
    model = standalone(4, 2, 8, biased=True)
    for value in model.graph.inputs:
        if value.name == "bias":
            value.shape = ir.Shape([None] * len(shape))  # so that the runtime itself lets it through
    session = harness.ort_session(ir.to_proto(lower(model, "fused")), own_operators=True)
    shapes = {"query": (1, 3, 32), "key": (1, 3, 16), "value": (1, 3, 16), "past_key": (1, 2, 8, 8), "past_value": (1, 2, 8, 8)}
    feeds = {name: np.ones(size, np.float32) for name, size in (shapes | {"bias": shape}).items()}
    with pytest.raises(Exception, match="FusedAttention: bias has a wrong shape"):
        session.run(None, feeds | {"position_ids": np.arange(3)[None]})


@pytest.mark.parametrize("left_out", [(1,), (2,), (5,), (1, 2), (1, 5)])
def test_inputs_that_belong_together(left_out):
    model = lower(standalone(4, 2, 8), "fused")
    node = model.graph.node(0)
    for index in left_out:
        node.replace_input_with(index, None)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]
    shapes = {"query": (1, 3, 32), "key": (1, 3, 16), "value": (1, 3, 16), "past_key": (1, 2, 8, 8), "past_value": (1, 2, 8, 8)}
    feeds = {name: np.ones(size, np.float32) for name, size in shapes.items()} | {"position_ids": np.arange(3)[None]}
    session = harness.ort_session(ir.to_proto(model), own_operators=True)
    with pytest.raises(Exception, match=r"key, value and position_ids .* belong together"):
        session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
