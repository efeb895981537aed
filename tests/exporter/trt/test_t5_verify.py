"""An encoder-decoder's two networks as TensorRT parses them: as planned they pass; each known-wrong one is refused, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from changed import SIZES, Graph, check
from onnx import TensorProto, helper, numpy_helper

from exporter.bundle import Bundle
from exporter.engines.tensorrt.api import Messages
from exporter.engines.tensorrt.network import Network, parse
from exporter.engines.tensorrt.verify import verify
from exporter.errors import GraphError

ENCODER, DECODER = 0, 1


@pytest.fixture(scope="module")
def bundle(t5_exported: Path) -> Bundle:
    """Pattern attention."""
    whole = Bundle.open(t5_exported)
    return Bundle(whole.path, tuple(variant for variant in whole.variants if variant.pattern == "attention"))


@pytest.fixture(scope="module")
def grouped(t5_exported: Path) -> Bundle:
    whole = Bundle.open(t5_exported)
    return Bundle(whole.path, tuple(variant for variant in whole.variants if variant.pattern == "grouped"))


def attention(graph: Graph, name: str) -> onnx.NodeProto:
    return next(node for node in graph.nodes("Attention") if f"/{name}/" in node.name)


def test_the_encoder_is_as_planned(api, bundle, grouped):
    """In fp32, in which TensorRT has no fused kernel for it."""
    facts = check(api, Graph(bundle, ENCODER))
    assert (facts.fused_attention, facts.decomposable_attention, facts.cache_updates) == (0, 2, 0)
    assert facts.heads == "6:6"
    assert check(api, Graph(grouped, ENCODER)).heads == "6:6"


def test_the_decoder_is_as_planned(api, bundle, grouped):
    facts = check(api, Graph(bundle, DECODER))
    assert (facts.fused_attention, facts.decomposable_attention, facts.cache_updates) == (6, 0, 6)
    assert facts.heads == "6:2"
    assert facts.causal == ("NONE",)
    assert check(api, Graph(grouped, DECODER)).cache_updates == 6


def test_a_step_takes_one_token(bundle):
    graph = Graph(bundle, DECODER)
    sizes = {**SIZES, **graph.part.known}
    assert sizes == {"batch": 2, "capacity": 32, "sequence": 1}
    ids = next(value for value in graph.graph.input if value.name == "input_ids")
    assert [dim.dim_value for dim in ids.type.tensor_type.shape.dim] == [2, 1]


@pytest.mark.parametrize(("part", "name", "words"), [
    (DECODER, "decoder/layers.1/self_attn", "layer 1: its attention has no mask"),
    (DECODER, "decoder/layers.2/cross_attn", "layer 2's cross-attention: its attention has no mask"),
    (ENCODER, "encoder/layers.0/self_attn", "encoder layer 0: its attention has no mask"),
])  # fmt: skip
def test_a_mask_that_is_left_out_is_refused(api, bundle, part, name, words):
    graph = Graph(bundle, part)
    del attention(graph, name).input[3:]
    with pytest.raises(GraphError, match=words):
        check(api, graph)


@pytest.mark.parametrize(("part", "layer", "weight"), [
    (DECODER, "layer 0", "decoder.bias.weight"),
    (ENCODER, "encoder layer 0", "encoder.bias.weight"),
])  # fmt: skip
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_a_mask_without_the_bias_is_refused(api, bundle, grouped, pattern, part, layer, weight):
    """What hides rows is there, what is added to the scores by distance is not."""
    graph = Graph(bundle if pattern == "attention" else grouped, part)
    add = next(node for node in graph.nodes("Add") if node.name.endswith("mask/bias/Add"))
    zero = graph.constant("none", np.zeros((1, 6, 1, 1), np.float32))
    add.input[0] = zero
    graph.graph.initializer.remove(next(t for t in graph.graph.initializer if t.name == weight))
    del graph.source.places[weight]
    _prune(graph.graph)
    with pytest.raises(GraphError, match=f"{layer}: its mask does not come from {weight}"):
        check(api, graph)


def _prune(graph: onnx.GraphProto) -> None:
    """Leave out what needs a tensor that nothing makes."""
    made = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    kept = []
    for node in graph.node:
        if all(name in made for name in node.input):
            kept.append(node)
            made |= set(node.output)
    del graph.node[:]
    graph.node.extend(kept)


def test_a_mask_of_the_other_attention_is_refused(api, bundle):
    graph = Graph(bundle, DECODER)
    attention(graph, "decoder/layers.1/cross_attn").input[3] = graph.constant("all", np.zeros((2, 1, 1, 1), np.float32))
    with pytest.raises(GraphError, match="layer 1's cross-attention: its mask does not come from encoder_attention_mask"):
        check(api, graph)


@pytest.mark.parametrize("part", [ENCODER, DECODER])
def test_scaled_scores_are_refused(api, bundle, part):
    """As a decoder's are, by 1/√D; T5's are not."""
    graph = Graph(bundle, part)
    (scale,) = (attribute for attribute in graph.nodes("Attention")[1].attribute if attribute.name == "scale")
    scale.f = 0.25
    with pytest.raises(GraphError, match=r"its scores are scaled by 0.25, planned 1"):
        check(api, graph)


def test_attention_that_may_be_decomposed_is_refused_where_a_kernel_is_planned(api, bundle):
    graph = Graph(bundle, DECODER)
    attention(graph, "decoder/layers.0/cross_attn").attribute.append(helper.make_attribute("TRT_decomposable", 1))
    with pytest.raises(GraphError, match="layer 0's cross-attention: its attention may be decomposed, planned fused"):
        check(api, graph)
    half = Graph(bundle, ENCODER)
    network = Network(api.trt, parse(api, half.source, Messages()).definition, half.source.numbers())
    half.variant = dataclasses.replace(half.variant, dtype="bf16")
    with pytest.raises(GraphError, match="planned bf16"):
        verify(network, half.part, SIZES)


def test_cross_attention_over_the_own_cache_is_refused(api, bundle):
    graph = Graph(bundle, DECODER)
    own, cross = (attention(graph, f"decoder/layers.0/{name}") for name in ("self_attn", "cross_attn"))
    cross.input[1], cross.input[2], cross.input[3] = own.input[1], own.input[2], own.input[3]
    with pytest.raises(GraphError, match=r"layer 0 has 2 fused attention layers over present.0.decoder.key, planned 1"):
        check(api, graph)


def test_cross_attention_over_another_layers_keys_is_refused(api, bundle, grouped):
    for given, words in ((bundle, "layer 0's cross-attention has 2 fused"), (grouped, "layer 1's cross-attention: past_key")):
        graph = Graph(given, DECODER)
        for node in graph.graph.node:
            node.input[:] = [name.replace("past_key_values.1.encoder", "past_key_values.0.encoder") for name in node.input]
        with pytest.raises(GraphError, match=words):
            check(api, graph)


def test_values_in_the_place_of_keys_are_refused(api, bundle):
    graph = Graph(bundle, DECODER)
    node = attention(graph, "decoder/layers.2/cross_attn")
    node.input[2] = node.input[1]
    with pytest.raises(GraphError, match=r"layer 2's cross-attention: its attention reads the values past_key_values.2.enc"):
        check(api, graph)


def test_a_repeated_cross_cache_is_refused(api, bundle):
    graph = Graph(bundle, DECODER)
    node = attention(graph, "decoder/layers.0/cross_attn")
    for index in (1, 2):
        node.input[index] = graph.before(node, "Concat", [node.input[index]] * 3, f"repeated {index}", axis=1)
    with pytest.raises(GraphError, match="layer 0's cross-attention has 0 fused attention layers"):
        check(api, graph)


def test_an_encoder_layer_over_another_ones_keys_is_refused(api, bundle, grouped):
    graph = Graph(bundle, ENCODER)
    first, second = graph.nodes("Attention")
    second.input[1] = first.input[1]
    with pytest.raises(GraphError, match=r"encoder layer 0 has 2 fused attention layers over encoder.layers.0.self_attn.k_p"):
        check(api, graph)
    graph = Graph(grouped, ENCODER)
    gemms = {node.input[1]: node for node in graph.nodes("Gemm")}
    gemms["encoder.layers.1.self_attn.k_proj.weight"].input[1] = "encoder.layers.0.self_attn.k_proj.weight"
    with pytest.raises(GraphError, match=r"encoder layer 1: encoder.layers.1.self_attn.k_proj.weight does not go into a mat"):
        check(api, graph)


def test_cross_caches_made_by_other_weights_are_refused(api, bundle):
    graph = Graph(bundle, ENCODER)
    gemms = {node.input[1]: node for node in graph.nodes("Gemm")}
    key, value = (gemms[f"decoder.layers.1.cross_attn.{x}_proj.weight"] for x in "kv")
    key.input[1], value.input[1] = value.input[1], key.input[1]
    words = (
        r"present.1.encoder.key is made by decoder.layers.1.cross_attn.v_proj.weight, planned decoder.layers.1.cross_attn.k_"
    )
    with pytest.raises(GraphError, match=words):
        check(api, graph)


@pytest.mark.parametrize("of", ["key", "value"])
def test_heads_and_tokens_of_what_the_encoder_makes_in_another_order_are_refused(api, bundle, of):
    """Reshaped to [B,H,E,D] instead of transposed: the shapes are the same."""
    graph = Graph(bundle, ENCODER)
    mixed_up(graph, graph.output(graph.nodes("Attention")[0].input[1 if of == "key" else 2]))
    with pytest.raises(GraphError, match=rf"encoder layer 0: its {of}s have heads and tokens in another order"):
        check(api, graph)
    graph = Graph(bundle, ENCODER)
    mixed_up(graph, graph.output(f"present.0.encoder.{of}"))
    with pytest.raises(GraphError, match=rf"present.0.encoder.{of} has heads and tokens in another order"):
        check(api, graph)


def mixed_up(graph: Graph, transpose: onnx.NodeProto) -> None:
    """The heads that it takes before the tokens are reshaped to the same shape."""
    assert transpose.op_type == "Transpose"
    shape = graph.before(transpose, "Shape", [transpose.input[0]], f"{transpose.name} shape")
    order = graph.constant(f"{transpose.name} order", np.array([0, 2, 1, 3]))
    target = graph.before(transpose, "Gather", [shape, order], f"{transpose.name} target")
    transpose.op_type = "Reshape"
    transpose.input.append(target)
    del transpose.attribute[:]


def test_cross_caches_of_an_inner_layer_are_refused(api, bundle):
    """Made of what the encoder's last layer reads, not of what comes out."""
    graph = Graph(bundle, ENCODER)
    gemms = {node.input[1]: node for node in graph.nodes("Gemm")}
    inner = gemms["encoder.layers.1.self_attn.q_proj.weight"].input[0]
    gemms["decoder.layers.0.cross_attn.k_proj.weight"].input[0] = inner
    with pytest.raises(GraphError, match=r"present.0.encoder.key does not come from the encoder's last norm"):
        check(api, graph)


def test_a_cross_cache_that_is_cast_is_refused(api, bundle):
    graph = Graph(bundle, DECODER)
    node = attention(graph, "decoder/layers.0/cross_attn")
    narrow = graph.before(node, "Cast", [node.input[1]], "narrow", to=TensorProto.FLOAT16)
    node.input[1] = graph.before(node, "Cast", [narrow], "wide", to=TensorProto.FLOAT)
    network = Network(api.trt, parse(api, graph.source, Messages()).definition, graph.source.numbers())
    with pytest.raises(GraphError, match=r"cache past_key_values.0.encoder.key is cast to fp16 \(and \d more"):
        verify(network, graph.part, {**SIZES, **graph.part.known})


def test_a_self_cache_that_is_copied_is_refused(api, bundle):
    graph = Graph(bundle, DECODER)
    update = graph.output("present.1.decoder.value")
    update.output[0] = "written"
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    graph.graph.node.append(helper.make_node("Mul", ["written", "one"], ["present.1.decoder.value"], name="copy"))
    attention(graph, "decoder/layers.1/self_attn").input[2] = "written"
    with pytest.raises(GraphError, match=r"present.1.decoder.value is made by a ELEMENTWISE layer, not by a KV-cache update"):
        check(api, graph)


@pytest.mark.parametrize("part", [DECODER, ENCODER])
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_a_mask_that_shows_the_filling_is_refused(api, bundle, grouped, pattern, part):
    """Of what the encoder reads, or has read: the rows that its mask hides and no others."""
    graph = Graph(bundle if pattern == "attention" else grouped, part)
    node = next(n for n in graph.nodes("Where") if "cross_attn" in n.name or part == ENCODER)
    node.input[0] = graph.before(node, "Not", [node.input[0]], "the others")
    source = "encoder_attention_mask" if part == DECODER else "attention_mask"
    with pytest.raises(GraphError, match=f"its mask does not let those that {source} tells be seen, and no others"):
        check(api, graph)
