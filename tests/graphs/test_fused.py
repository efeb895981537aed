"""headpool::FusedAttention against the grouped lowering in ONNX Runtime's own operators, and what the pattern matches."""

from __future__ import annotations

import functools

import harness
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_attention import build, feeds

from graphs.canonical import DOMAIN, standalone
from graphs.errors import GraphError
from graphs.lower import lower

TOLERANCE = 5e-5  # absolute, of outputs of order 1


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in lower(model, "fused").graph]


@functools.cache
def sessions(*sizes: int):
    """Of the fused and of the grouped pattern."""
    model = build(*sizes)
    return tuple(
        harness.ort_session(ir.to_proto(lower(model, pattern)), own_operators=pattern == "fused", threads=2)
        for pattern in ("fused", "grouped")
    )


@st.composite
def cases(draw):
    G, R = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    D = draw(st.sampled_from([8, 12, 16, 64, 80]))
    Dv = draw(st.sampled_from([D, D, D // 2, 20]))
    rotary = draw(st.sampled_from([0, D, D // 2]))
    T = draw(st.sampled_from([1, 1, 1, 2, 5, 70]))
    S = T + draw(st.sampled_from([0, 1, 63, 64, 200, 1500, 2300]))  # above 1024 rows a decode step is split in parts
    starts = draw(st.lists(st.integers(0, S - T), min_size=1, max_size=3))
    if draw(st.booleans()):
        starts[0] = S - T  # up to the last row
    return (R * G, G, D, Dv, rotary), starts, T, S, draw(st.integers(0, 99))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_the_operator_is_the_grouped_lowering(case):
    sizes, starts, T, S, seed = case
    given_ones = feeds(*sizes, starts, T, S, seed)
    fused, grouped = sessions(*sizes)
    output, *present = fused.run(None, given_ones)
    # To the grouped pattern NaN counts even where masked. Zeros in its place are never seen.
    expected, *caches = grouped.run(None, {name: np.nan_to_num(array) for name, array in given_ones.items()})
    np.testing.assert_allclose(output, expected, rtol=0, atol=TOLERANCE)
    for actual, wanted in zip(present, caches, strict=True):
        for b, start in enumerate(starts):
            np.testing.assert_allclose(actual[b, :, : start + T], wanted[b, :, : start + T], rtol=0, atol=1e-5)
            assert np.isnan(actual[b, :, start + T :]).all()  # untouched


@pytest.mark.parametrize("T", [1, 6])
def test_in_place_and_not(T):
    """Bound as input and output, one buffer is written in place; else the cache given stays as it was."""
    sizes, S = (6, 2, 16, 16, 16), 40
    given_ones = feeds(*sizes, [11, 30], T, S)
    session, _ = sessions(*sizes)
    before = {name: array.copy() for name, array in given_ones.items()}
    expected = session.run(None, given_ones)
    for name, array in given_ones.items():
        np.testing.assert_array_equal(array, before[name])
    binding = session.io_binding()
    for name, array in given_ones.items():
        binding.bind_cpu_input(name, array)
    output = np.zeros_like(expected[0])
    buffers = [output, given_ones["past_key"], given_ones["past_value"]]
    for value, array in zip(session.get_outputs(), buffers, strict=True):
        binding.bind_output(value.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    for actual, wanted in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize(
    "positions",
    [[[8]], [[-1]], [[2**40]], [[-(2**62)]], [[5, 6, 7, 8]], [[3, 4, 8]], [[7, 0]], [[0, -5]], [[0, -(2**62)]], [[0] * 9]],
)
def test_positions_outside_the_cache(positions):
    sizes = (4, 2, 8, 8, 8)
    given_ones = {**feeds(*sizes, [0], len(positions[0]), 8), "position_ids": np.array(positions)}
    session, _ = sessions(*sizes)
    with pytest.raises(Exception, match="FusedAttention: a position lies outside the cache"):
        session.run(None, given_ones)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query", (1, 3, 31)),
        ("key", (1, 2, 16)),
        ("value", (2, 3, 16)),
        ("past_key", (2, 2, 8, 8)),
        ("past_value", (1, 2, 9, 8)),
        ("cos", (1, 3, 5)),
        ("sin", (1, 3, 3)),
    ],
)
def test_shapes_that_contradict_each_other(name, shape):
    sizes = (4, 2, 8, 8, 8)
    symbolic = build(*sizes)
    for value in (*symbolic.graph.inputs, *symbolic.graph.outputs):
        if value.name not in ("past_key", "past_value"):
            value.shape = ir.Shape([None] * len(value.shape))  # so that the runtime itself lets them through
    session = harness.ort_session(ir.to_proto(lower(symbolic, "fused")), own_operators=True)
    with pytest.raises(Exception, match=r"FusedAttention: .*(contradict|INVALID_ARGUMENT|wrong rank|does not fit)"):
        session.run(None, {**feeds(*sizes, [2], 3, 8), name: np.ones(shape, np.float32)})


def test_no_tokens():
    sizes = (4, 2, 8, 8, 8)
    output, key, _ = sessions(*sizes)[0].run(None, feeds(*sizes, [0, 0], 0, 8))
    assert output.shape == (2, 0, 32)
    assert np.isnan(key).all()


def test_rotations_become_part_of_it():
    assert operators(build(6, 2, 16, 16, 0)) == ["FusedAttention"]
    assert operators(build(6, 2, 16, 16, 16)) == ["FusedAttention"]
    assert operators(build(6, 2, 16, 8, 8)) == ["FusedAttention"]
    (node,) = lower(build(6, 2, 16, 16, 16), "fused").graph
    assert [value.name for value in node.inputs[5:]] == ["position_ids", "cos", "sin"]
    assert (node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()) == (6, 2)
    assert node.attributes["scale"].as_float() == 0.25


@pytest.mark.parametrize("changes", [{"query": "cos.query"}, {"key": "cos.key"}, {"interleaved": 1}])
def test_rotations_that_it_cannot_do_stay_where_they_are(changes):
    model = build(6, 2, 16, 16, 16, **changes)
    assert sorted(operators(model)) == ["FusedAttention", "RotaryEmbedding", "RotaryEmbedding"]
    given_ones = feeds(6, 2, 16, 16, 16, [5, 9], 2, 20)
    given_ones |= {name: given_ones["cos"][:, ::-1].copy() for name in changes.values() if isinstance(name, str)}
    names = {value.name for value in model.graph.inputs}
    given_ones = {name: np.nan_to_num(array) for name, array in given_ones.items() if name in names}
    results = [
        harness.ort_session(ir.to_proto(lower(model, pattern)), own_operators=pattern == "fused").run(None, given_ones)
        for pattern in ("fused", "grouped")
    ]
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_only_one_of_both_rotated():
    model = build(6, 2, 16, 16, 16)
    node = model.graph.node(2)
    node.replace_input_with(1, node.inputs[1].producer().inputs[0])
    assert sorted(operators(model)) == ["FusedAttention", "RotaryEmbedding"]


@pytest.mark.parametrize(
    ("static", "dtype", "reason"),
    [
        (False, ir.DataType.FLOAT, "its cache is concat; headpool's operators work on a static cache"),
        (True, ir.DataType.FLOAT16, "it is fp16; headpool's operators are for fp32"),
        (True, ir.DataType.BFLOAT16, "it is bf16; headpool's operators are for fp32"),
    ],
)
def test_refusals(static, dtype, reason):
    model = standalone(8, 2, 16, static, dtype)
    before = [str(node) for node in model.graph]
    with pytest.raises(GraphError) as caught:
        lower(model, "fused")
    assert str(caught.value) == f"pattern fused does not fit node {model.graph.node(0).name}: {reason}"
    assert [str(node) for node in model.graph] == before


def test_no_canonical_node_is_left_and_names_stay():
    lowered = lower(build(6, 2, 16, 16, 16), "fused")
    assert [value.name for value in lowered.graph.outputs] == ["output", "present_key", "present_value"]
    assert {node.domain for node in lowered.graph} == {DOMAIN}


def flat_query(after: list[tuple[str, list[int] | None]]) -> ir.Model:
    """One attention over 4 query heads of 6 and values of 10 whose query is a Reshape of [B·T,H·D]; `after` follows its output:
    operators, with the target of a Reshape or the permutation of a Transpose."""
    heads, groups, size, width = 4, 2, 6, 10
    model = standalone(heads, groups, size, value_dim=width)
    graph, node = model.graph, model.graph.node(0)
    flat = ir.Value(name="flat", shape=ir.Shape(["R", heads * size]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs[list(graph.inputs).index(node.inputs[0])] = flat

    def reshape(x: ir.Value, target: list[int], name: str, rank: int) -> ir.Node:
        shape = ir.Value(name=f"{name}.shape", const_value=ir.tensor(np.array(target)), shape=ir.Shape([len(target)]))
        graph.register_initializer(shape)
        made = ir.node("Reshape", [x, shape], name=name)
        made.outputs[0].shape = ir.Shape([f"{name}{axis}" for axis in range(rank - 1)] + [target[-1]])
        return made

    query = reshape(flat, [1, -1, heads * size], "query.flat", 3)
    graph.insert_before(node, query)
    node.replace_input_with(0, query.outputs[0])
    value = node.outputs[0]
    place = list(graph.outputs).index(value)
    for index, (op_type, numbers) in enumerate(after):
        if op_type == "Reshape":
            following = reshape(value, numbers, f"after{index}", 2)
        else:
            following = ir.node(op_type, [value], {"perm": numbers} if numbers else {}, name=f"after{index}")
        graph.insert_after(list(graph)[-1], following)
        value = following.outputs[0]
        value.name, value.type = f"after{index}.y", ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[place] = value
    return model


@pytest.mark.parametrize(
    "after",
    [
        [("Reshape", [-1, 40]), ("Relu", None)],
        [("Reshape", [-1, 10]), ("Softmax", None)],
        [("Reshape", [-1, 40])],
        [("Transpose", [0, 2, 1])],
    ],
    ids=["to the rows of a linear layer", "to heads", "an output of the graph", "no reshape"],
)
def test_what_follows_its_output_keeps_its_shape(after):
    rng, results = np.random.default_rng(0), []
    shapes = {"flat": (3, 24), "key": (1, 3, 12), "value": (1, 3, 20), "past_key": (1, 2, 8, 6), "past_value": (1, 2, 8, 10)}
    given_ones = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    given_ones["position_ids"] = np.arange(3)[None]
    for pattern in ("fused", "grouped"):
        model = ir.to_proto(lower(flat_query(after), pattern))
        results.append(harness.ort_session(model, own_operators=pattern == "fused").run(None, given_ones))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
