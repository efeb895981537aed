"""Queries, keys and values made of other weights, in another order or scaled once more: each is refused, by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import tiny
from changed import Graph, check
from onnx import TensorProto, helper

from exporter.errors import GraphError


def test_scores_of_another_scale_are_refused(api, attention):
    graph = Graph(attention)
    (scale,) = (attribute for attribute in graph.nodes("Attention")[0].attribute if attribute.name == "scale")
    scale.f = 1.0
    with pytest.raises(GraphError, match=r"layer 0: its scores are scaled by 1, planned 0.25"):
        check(api, graph)


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_keys_written_where_values_belong_are_refused(api, decoder, tmp_path, pattern):
    """Every name, shape and alias is right; what is written are the other's rows."""
    graph = Graph(tiny.bundle(tmp_path, decoder, pattern, dtype="fp16"))
    key, value = graph.nodes("TensorScatter")[:2]
    key.input[1], value.input[1] = value.input[1], key.input[1]
    made, planned = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "vk")
    words = rf"what is written into present.0.key is made by {made}, planned {planned}"
    with pytest.raises(GraphError, match=words):
        check(api, graph)


def doubled(graph: Graph, node: onnx.NodeProto, index: int, by: float = 2.0) -> None:
    """What `node` reads there is multiplied by a number more."""
    number = graph.constant(f"{by} of {node.name}", np.float16(by))
    node.input[index] = graph.before(node, "Mul", [node.input[index], number], f"{node.name}.{index}.scaled")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_scaled_before_attention_is_refused(api, attention, index):
    graph = Graph(attention)
    doubled(graph, graph.nodes("Attention")[1], index)
    words = "its values are multiplied by 2" if index == 2 else "its scores are scaled by 0.5, planned 0.25"
    with pytest.raises(GraphError, match=f"layer 1: {words}"):
        check(api, graph)


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
@pytest.mark.parametrize("of", ["query", "key"])
def test_what_is_scaled_before_its_rotation_is_refused(api, decoder, tmp_path, pattern, of):
    graph = Graph(tiny.bundle(tmp_path, decoder, pattern, dtype="fp16"))
    node = next(
        n
        for n in graph.nodes("RotaryEmbedding")
        if n.name.endswith(
            f"layers.0/self_attn/{of}/RotaryEmbedding" * (of == "query") or f"layers.0/self_attn/cache/{of}/RotaryEmbedding"
        )
    )
    doubled(graph, node, 0)
    words = (
        "layer 0: its scores are scaled by 0.5" if of == "query" else "what is written into present.0.key is multiplied by 2"
    )
    with pytest.raises(GraphError, match=words):
        check(api, graph)


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
@pytest.mark.parametrize("how", ["sum", "cast", "unrotated", "permuted", "exchanged", "untransposed"])
def test_rows_that_are_not_its_layers_keys_alone_are_refused(api, decoder, tmp_path, pattern, how):
    """Of right names, shapes and weights: values added, precision lost, positions left out, KV heads in another order."""
    graph = Graph(tiny.bundle(tmp_path, decoder, pattern, dtype="fp16"))
    key, value = graph.nodes("TensorScatter")[:2]
    if how == "sum":
        key.input[1] = graph.before(key, "Add", [key.input[1], value.input[1]], "keys and values")
        words = "made by the ELEMENTWISE layer keys and values"
    elif how == "cast":
        short = graph.before(key, "Cast", [key.input[1]], "short", to=TensorProto.BFLOAT16)
        key.input[1] = graph.before(key, "Cast", [short], "long", to=TensorProto.FLOAT16)
        words = "made by the CAST layer long"
    elif how == "unrotated":
        key.input[1] = graph.output(key.input[1]).input[0]
        words = "not rotated by its positions"
    elif how == "exchanged":
        whole, axis = key.input[1], graph.constant("axis", np.array([1]))
        ends = [[graph.constant(f"{at}", np.array([at])), graph.constant(f"to {at + 1}", np.array([at + 1]))] for at in (1, 0)]
        parts = [graph.before(key, "Slice", [whole, *end, axis], f"head {number}") for number, end in enumerate(ends)]
        key.input[1] = graph.before(key, "Concat", parts, "exchanged", axis=1)
        words = "made by the CONCATENATION layer exchanged"
    elif how == "untransposed":  # right for one token
        key, words = value, "made by heads and tokens in another order"
        transpose = graph.output(value.input[1])
        shape = graph.constant("heads before tokens", np.array([2, 2, -1, 16]))
        value.input[1] = graph.before(value, "Reshape", [transpose.input[0], shape], "untransposed")
    else:
        key.input[1] = graph.before(key, "Gather", [key.input[1], graph.constant("1, 0", np.array([1, 0]))], "order", axis=1)
        words = "made by the GATHER layer order"
    name = "value" if how == "untransposed" else "key"
    with pytest.raises(GraphError, match=f"what is written into present.0.{name} is {words}"):
        check(api, graph)


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_queries_of_other_weights_or_positions_are_refused(api, decoder, tmp_path, pattern):
    graph = Graph(tiny.bundle(tmp_path, decoder, pattern, dtype="fp16"))
    first, second = (
        next(n for n in graph.nodes("Gemm") if n.name.endswith(f"layers.{i}/self_attn/q_proj/Gemm")) for i in (0, 1)
    )
    first.input[1], second.input[1] = second.input[1], first.input[1]
    with pytest.raises(GraphError, match=r"layer 0: its queries are made by model.layers.1.self_attn.q_proj.weight, planned"):
        check(api, graph)
    first.input[1], second.input[1] = second.input[1], first.input[1]
    rotation = next(n for n in graph.nodes("RotaryEmbedding") if n.name.endswith("layers.1/self_attn/query/RotaryEmbedding"))
    taker = next(n for n in graph.graph.node if rotation.output[0] in n.input)
    taker.input[0] = rotation.input[0]
    with pytest.raises(GraphError, match=r"layer 1: its queries are not rotated by their positions"):
        check(api, graph)


def test_a_factor_inside_a_gate_is_refused(api, tmp_path):
    model = tiny.decoder(dataclasses.replace(tiny.CONFIG, glu_value_dim=8))
    graph = Graph(tiny.bundle(tmp_path, model, "grouped", dtype="fp16"))
    product = next(n for n in graph.graph.node if n.op_type == "Mul" and n.name.endswith("layers.0/self_attn/Mul_1"))
    doubled(graph, product, 0)
    with pytest.raises(GraphError, match=r"what is written into present.0.value is made by the ELEMENTWISE"):
        check(api, graph)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_grouped_scores_of_another_scale_are_refused(api, decoder, tmp_path, dtype):
    graph = Graph(tiny.bundle(tmp_path, decoder, "grouped", dtype=dtype))
    (scaled,) = (node for node in graph.nodes("Mul") if node.name.endswith("layers.1/self_attn/query/Mul"))
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    graph.graph.initializer.append(helper.make_tensor("another scale", kind, [], [0.5]))
    scaled.input[1] = "another scale"
    with pytest.raises(GraphError, match=r"layer 1: its scores are scaled by 0.5, planned 0.25"):
        check(api, graph)
