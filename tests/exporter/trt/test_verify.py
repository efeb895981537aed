"""Networks as TensorRT parses them: those that are as planned pass; each known-wrong one is refused, by name."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
from changed import SIZES, Graph, check
from onnx import TensorProto, helper, numpy_helper

from exporter.engines.tensorrt.api import Messages
from exporter.engines.tensorrt.network import Network, parse
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.verify import check_casts, check_nodes, verify
from exporter.engines.tensorrt.verify_attention import check_grouped
from exporter.engines.tensorrt.weights import Source, fix_shapes
from exporter.errors import GraphError
from graphs.canonical import standalone
from graphs.lower import lower


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_what_headpool_exports_is_as_planned(api, decoder, tmp_path, pattern, dtype, logits):
    facts = check(api, Graph(tiny.bundle(tmp_path, decoder, pattern, dtype=dtype, logits=logits)))
    kinds = (0, 0) if pattern == "grouped" else (0, 2) if dtype == "fp32" else (2, 0)
    assert (facts.fused_attention, facts.decomposable_attention) == kinds
    assert facts.cache_updates == 4
    assert facts.heads == ("6:2", "6:3")


def test_upper_left_causality_is_refused(api, attention):
    """`is_causal` without a mask parses, to a triangle that starts at the first cache row."""
    graph = Graph(attention)
    for node in graph.nodes("Attention"):
        del node.input[3:]
        node.attribute.append(helper.make_attribute("is_causal", 1))
    with pytest.raises(GraphError, match="layer 0: its attention is causal UPPER_LEFT, planned NONE: wrong for decoding"):
        check(api, graph)


def test_nonpad_kv_seqlen_is_refused(api, attention):
    """The parser takes the input and leaves it out of the network."""
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    rows = graph.nodes("TensorScatter")[0].input[2]
    lengths = graph.before(node, "Add", [rows, graph.constant("one", np.array(1))], "lengths")
    node.input.extend(["", "", lengths])
    with pytest.raises(GraphError, match="the result of lengths is not used: an input of a node was ignored"):
        check(api, graph)


def test_nonpad_kv_seqlen_as_an_input_is_refused(api, attention):
    graph = Graph(attention)
    graph.graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [2]))
    graph.nodes("Attention")[0].input.extend(["", "", "lengths"])
    with pytest.raises(GraphError, match=r"input lengths is not in the contract \(and 1 more"):
        check(api, graph)


def test_nonpad_kv_seqlen_that_something_else_reads_is_refused(api, attention):
    """A trace of it is left in the network then, and each of its layers has a reader: only the node tells."""
    graph = Graph(attention)
    rows = graph.nodes("TensorScatter")[0].input[2]
    graph.nodes("Attention")[0].input.extend(["", "", rows])
    with pytest.raises(GraphError, match=rf"attention \S+ has {re.escape(rows)}, which the parser may ignore"):
        check(api, graph)


def test_what_an_attribute_changes_is_refused(api, attention):
    graph = Graph(attention)
    graph.nodes("Attention")[1].attribute.append(helper.make_attribute("softcap", 30.0))
    with pytest.raises(GraphError, match=r"has softcap, which the parser may ignore|does not take"):
        check(api, graph)


def test_attention_with_several_outputs_is_refused(api, attention):
    """Caches passed through Attention itself: past in, present out."""
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    node.input.extend(["past_key_values.0.key", "past_key_values.0.value"])
    node.output.extend(["more keys", "more values"])
    with pytest.raises(GraphError, match=r"tensorrt_rtx .* does not take attention.*Attention"):
        check(api, graph)


def test_unequal_head_sizes_are_refused_where_attention_is_fused(api):
    """Q and K of 16 channels, V of 8, as GLU attention has them."""
    dims = {"q": 16, "k": 16, "v": 8}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 2, 4, d]) for n, d in dims.items()]
    inputs.append(helper.make_tensor_value_info("m", TensorProto.FLOAT16, [1, 1, 4, 4]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 2, 4, 8])
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=[helper.make_opsetid("", 24)])
    with pytest.raises(GraphError, match="does not take"):
        parse(api, Source(model, tiny.Path("v.onnx")), Messages())


def unequal(pattern: str) -> onnx.ModelProto:
    """One canonical node with K heads of 16 and V heads of 8, lowered; B = 1, S = 32."""
    model = ir.to_proto(lower(standalone(6, 2, 16, dtype=ir.DataType.FLOAT16, value_dim=8), pattern))
    fix_shapes(model, {"B": 1, "S": 32})
    return model


def test_unequal_head_sizes_go_as_grouped_and_not_fused_as_they_are(api):
    parsed = parse(api, Source(unequal("grouped"), tiny.Path("v.onnx")), Messages())
    network = Network(api.trt, parsed.definition, {})
    assert len(network.of("KV_CACHE_UPDATE")) == 2
    assert network.outputs["present_value"].shape == (1, 2, 32, 8)
    assert network.outputs["output"].shape == (1, -1, 48)
    with pytest.raises(GraphError, match="Key and Value must have the same shape"):  # which is why heads.py pads
        parse(api, Source(unequal("attention"), tiny.Path("v.onnx")), Messages())


def test_a_cache_that_is_copied_is_refused(api, attention):
    graph = Graph(attention)
    update = graph.output("present.1.value")
    update.output[0] = "written"
    one = graph.constant("one", np.float16(1))
    graph.graph.node.append(helper.make_node("Mul", ["written", one], ["present.1.value"], name="copy"))
    graph.nodes("Attention")[1].input[2] = "written"
    with pytest.raises(
        GraphError, match=r"present.1.value is made by a ELEMENTWISE layer, not by a KV-cache update: it is a copy"
    ):
        check(api, graph)


def test_a_cache_that_another_layer_writes_is_refused(api, attention):
    """Layer 0's keys into layer 0's values and the other way about: every name and shape is right."""
    graph = Graph(attention)
    key, value = graph.nodes("TensorScatter")[:2]
    key.input[0], value.input[0] = value.input[0], key.input[0]
    with pytest.raises(GraphError, match=r"present.0.key updates past_key_values.0.value, not past_key_values.0.key"):
        check(api, graph)


def test_a_cache_read_before_its_update_is_refused(api, attention):
    graph = Graph(attention)
    graph.nodes("Attention")[0].input[1] = "past_key_values.0.key"
    with pytest.raises(GraphError, match=r"past_key_values.0.key is also read by"):
        check(api, graph)


def test_attention_over_another_layers_cache_is_refused(api, attention):
    graph = Graph(attention)
    second = graph.nodes("Attention")[1]
    second.input[1], second.input[2] = "present.0.key", "present.0.value"
    with pytest.raises(GraphError, match=r"layer 0 has 2 fused attention layers over present.0.key, planned 1"):
        check(api, graph)


def test_keys_and_values_in_each_others_place_are_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    node.input[1], node.input[2] = node.input[2], node.input[1]
    with pytest.raises(GraphError, match=r"layer 0 has 0 fused attention layers over present.0.key"):
        check(api, graph)


def test_a_repeated_cache_is_refused(api, attention):
    """The head ratio is lost where K and V are expanded before the fused attention."""
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    for index in (1, 2):
        parts = [node.input[index]] * 3
        node.input[index] = graph.before(node, "Concat", parts, f"repeated {index}", axis=1)
    with pytest.raises(GraphError, match=r"layer 0 has 0 fused attention layers over present.0.key, planned 1"):
        check(api, graph)


def test_an_input_of_which_only_the_shape_is_read_is_refused(api, attention):
    graph = Graph(attention)
    node = next(n for n in graph.graph.node if "input_ids" in n.input and n.op_type != "Shape")
    shape = graph.before(node, "Shape", ["input_ids"], "its shape")
    zeros = graph.before(node, "Expand", [graph.constant("token 0", np.array([0])), shape], "tokens 0")
    node.input[list(node.input).index("input_ids")] = zeros
    with pytest.raises(GraphError, match="input input_ids is not used, but for its shape"):
        check(api, graph)


@pytest.mark.parametrize("change", ["softcap", "more outputs", "its own past"])
def test_what_the_parser_may_ignore_is_refused_by_the_node(attention, change):
    """Here without the parser, which refuses some of them today."""
    graph = Graph(attention)
    node = graph.nodes("Attention")[1]
    if change == "softcap":
        node.attribute.append(helper.make_attribute("softcap", 30.0))
    elif change == "more outputs":
        node.output.extend(["more keys"])
    else:
        node.input.extend(["past_key_values.0.key"])
    found = {"softcap": "softcap", "more outputs": "more keys", "its own past": "past_key_values.0.key"}[change]
    with pytest.raises(GraphError, match=f"attention {re.escape(node.name)} has {found}, which the parser may ignore"):
        check_nodes(graph.source, graph.part)


def test_another_head_count_than_planned_is_refused(api, attention):
    graph = Graph(attention)
    graph.variant = dataclasses.replace(graph.variant, config=dataclasses.replace(graph.variant.config, num_heads=12))
    with pytest.raises(
        GraphError, match=r"layer 0: its attention has \[6, 2, 2\] query, key and value heads, planned \[12, 2, 2\]"
    ):
        check(api, graph)


def test_other_kv_heads_than_planned_are_refused(api, grouped):
    graph = Graph(grouped)
    graph.variant = dataclasses.replace(graph.variant, config=graph.variant.config.with_kv_heads((3, 3)))
    with pytest.raises(
        GraphError, match=r"input past_key_values.0.key is fp16 \[2, 2, 32, 16\], planned fp16 \[2, 3, 32, 16\]"
    ):
        check(api, graph)


def test_attention_that_may_be_decomposed_is_refused(api, attention):
    graph = Graph(attention)
    graph.nodes("Attention")[0].attribute.append(helper.make_attribute("TRT_decomposable", 1))
    with pytest.raises(GraphError, match="layer 0: its attention may be decomposed, planned fused"):
        check(api, graph)


def test_decomposed_attention_is_refused(api, decoder, tmp_path):
    """A graph of MatMul and Softmax under the name of the fused pattern."""
    graph = Graph(tiny.bundle(tmp_path, decoder, "grouped", dtype="fp16"))
    graph.variant = dataclasses.replace(graph.variant, pattern="attention")
    with pytest.raises(GraphError, match=r"layer 0 has 0 fused attention layers over present.0.key, planned 1"):
        check(api, graph)


def test_repeated_heads_are_refused_as_grouped(api, decoder, tmp_path):
    graph = Graph(tiny.bundle(tmp_path, decoder, "repeat", cache="static", dtype="fp16"))
    graph.variant = dataclasses.replace(graph.variant, pattern="grouped")
    with pytest.raises(GraphError, match=r"layer 0.*present.0.key does not go into a matrix product as it is"):
        check(api, graph)


def test_fused_attention_is_refused_as_grouped(api, attention):
    graph = Graph(attention)
    graph.variant = dataclasses.replace(graph.variant, pattern="grouped")
    with pytest.raises(GraphError, match="there are 2 fused attention layers, planned none in pattern grouped"):
        check(api, graph)


def test_a_softmax_over_another_axis_is_refused(api, grouped):
    graph = Graph(grouped)
    (axis,) = (attribute for attribute in graph.nodes("Softmax")[0].attribute if attribute.name == "axis")
    axis.i = 1
    with pytest.raises(GraphError, match=r"layer 0: its softmax is over axes \[1\], planned the cache rows"):
        check(api, graph)


def test_a_cast_cache_is_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    wide = graph.before(node, "Cast", [node.input[1]], "wide", to=TensorProto.FLOAT)
    node.input[1] = graph.before(node, "Cast", [wide], "narrow", to=TensorProto.FLOAT16)
    with pytest.raises(GraphError, match=r"cache present.0.key is cast to fp32 \(and \d more"):
        check(api, graph)
    network = Network(api.trt, parse(api, graph.source, Messages()).definition, graph.source.numbers())
    assert list(check_casts(network, graph.part)) == ["cache present.0.key is cast to fp32"]


def test_a_cast_weight_is_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("Gemm")[0]
    wide = graph.before(node, "Cast", [node.input[1]], "wide", to=TensorProto.FLOAT)
    node.input[1] = graph.before(node, "Cast", [wide], "narrow", to=TensorProto.FLOAT16)
    with pytest.raises(GraphError, match=r"weight model.layers.0.self_attn.q_proj.weight is cast to fp32"):
        check(api, graph)


def test_a_weight_cast_on_its_way_is_refused(api, attention):
    """Transposed first: what is cast is no weight any more, but comes from one."""
    graph = Graph(attention)
    node = graph.nodes("Gemm")[0]
    (turned,) = (attribute for attribute in node.attribute if attribute.name == "transB")
    turned.i = 0
    before = graph.before(node, "Transpose", [node.input[1]], "turned", perm=[1, 0])
    wide = graph.before(node, "Cast", [before], "wide", to=TensorProto.FLOAT)
    node.input[1] = graph.before(node, "Cast", [wide], "narrow", to=TensorProto.FLOAT16)
    words = r"weight model.layers.0.self_attn.q_proj.weight is cast on its way to \S*q_proj/Gemm"
    with pytest.raises(GraphError, match=words):
        check(api, graph)


def test_a_product_in_another_dtype_is_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("Gemm")[0]
    x = graph.before(node, "Cast", [node.input[0]], "x wide", to=TensorProto.FLOAT)
    weight = next(t for t in graph.graph.initializer if t.name == node.input[1])
    wide = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), "w wide")
    graph.graph.initializer.append(wide)
    old, node.input[0], node.input[1] = node.output[0], x, "w wide"
    node.output[0] = "y wide"
    index = list(graph.graph.node).index(node)
    graph.graph.node.insert(index + 1, helper.make_node("Cast", ["y wide"], [old], to=TensorProto.FLOAT16, name="y narrow"))
    with pytest.raises(GraphError, match=r"q_proj/Gemm multiplies fp32, planned fp16"):
        check(api, graph)


def test_other_names_than_the_contracts_are_refused(api, attention):
    graph = Graph(attention)
    for node in graph.graph.node:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    graph.graph.input[0].name = "ids"
    with pytest.raises(GraphError, match=r"input input_ids is missing, planned int64 \[2, -1\]"):
        check(api, graph)


def test_values_of_another_cache_are_refused(api, attention):
    graph = Graph(attention)
    graph.nodes("Attention")[0].input[2] = "present.0.key"
    with pytest.raises(GraphError, match=r"layer 0: its attention reads the values present.0.key, planned present.0.value"):
        check(api, graph)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": ["key_value_lengths"]}, "layer 1: its attention has key_value_lengths, planned none"),
        ({"norm": "NONE"}, "layer 1: its attention normalises by NONE, planned SOFTMAX"),
    ],
)
def test_what_only_other_operators_make_is_refused(api, attention, changes, words):
    """TRT_Attention and TensorRT's own API can set these; a parsed network with them is made by hand here."""
    graph = Graph(attention)
    parsed = parse(api, graph.source, Messages())
    network = Network(api.trt, parsed.definition, graph.source.numbers())
    network.of("ATTENTION_INPUT")[1].details.update(changes)
    with pytest.raises(GraphError, match=words):
        verify(network, graph.part, SIZES)


def test_values_without_a_softmax_are_refused(api, grouped):
    graph = Graph(grouped)
    softmax = graph.nodes("Softmax")[0]
    softmax.op_type = "Sigmoid"
    del softmax.attribute[:]
    with pytest.raises(GraphError, match=r"layer 0: its values are not weighted by a softmax"):
        check(api, graph)


def test_grouped_heads_other_than_planned_are_refused(api, grouped):
    graph = Graph(grouped)
    network = Network(api.trt, parse(api, graph.source, Messages()).definition, graph.source.numbers())
    config = graph.variant.config
    more = dataclasses.replace(graph.variant, config=dataclasses.replace(config, num_heads=12))
    with pytest.raises(GraphError, match="layer 0: its output is not taken apart into 12 query heads"):
        verify(network, parts_of(more)[0], SIZES)
    fewer = dataclasses.replace(graph.variant, config=config.with_kv_heads((2, 2)))
    assert list(check_grouped(network, parts_of(fewer)[0])) == ["layer 1 has products over 3 key and 3 value heads, planned 2"]
