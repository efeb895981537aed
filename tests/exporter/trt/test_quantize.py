"""Quantised weights: their layout against ONNX Runtime's DequantizeLinear, and engines that hold them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper

from exporter.engines.tensorrt.api import Messages
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.network import Network, parse
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.engines.tensorrt.quantize import KINDS, quantize, quantize_weights
from exporter.engines.tensorrt.verify import verify
from exporter.engines.tensorrt.weights import open_source
from exporter.errors import EngineError, GraphError

CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=96, intermediate_size=64)


@pytest.fixture(scope="module")
def decoder() -> tiny.Decoder:
    generator = torch.Generator().manual_seed(3)
    model = tiny.Decoder(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def dequantised(data: np.ndarray, scale: np.ndarray, shape: tuple[int, int], kind: str, block: int) -> np.ndarray:
    """What ONNX Runtime makes of it."""
    q = helper.make_tensor("q", KINDS[kind].element, shape, data.tobytes(), raw=True)
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=1, block_size=block)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)
    graph = helper.make_graph([node], "g", [], [output], [q, numpy_helper.from_array(scale, "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0]


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7)])
def test_quantised_weights_are_what_onnxruntime_reads(kind, levels):
    weight = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32) * np.arange(1, 7)[:, None]
    weight[2, 32:64] = 0  # a block of zeros has no scale of its own
    data, scale = quantize(weight, kind, 32, np.dtype(np.float16))
    assert scale.shape == (6, 3)
    back = dequantised(data, scale, weight.shape, kind, 32).astype(np.float32)
    step = np.abs(weight.reshape(6, 3, 32)).max(2) / levels
    assert (np.abs(back - weight).reshape(6, 3, 32) <= 0.51 * step[:, :, None] + 1e-6).all()
    assert not np.array_equal(back, weight)


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7)])
def test_small_weights_are_as_exact_as_large_ones(kind, levels):
    """Blocks whose scale is below fp16's smallest normal number: 1e-5 is a subnormal of 168 units, half of one is lost."""
    weight = np.random.default_rng(0).uniform(-1, 1, (6, 96)).astype(np.float32) * levels * 1e-5
    data, scale = quantize(weight, kind, 32, np.dtype(np.float16))
    back = dequantised(data, scale, weight.shape, kind, 32).astype(np.float32)
    assert np.abs(back - weight).max() < 0.51e-5 + levels * 2**-25  # half a step, and what rounding the scale moves the last


@pytest.mark.parametrize(("kind", "target"), [("int4", "sm80"), ("int4", "sm86"), ("int8", "sm75"), ("int8", "sm80")])
def test_the_oldest_chips_of_each_kind_build(decoder, tmp_path, kind, target):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="fp16")
    (built,) = build(bundle, BuildOptions(targets=(target,), capacity=32, prefill=8, quantize=kind))
    assert built.record.network.dequantised_weights == 2 * 7


def test_fp8_keeps_the_relative_error_of_three_bits():
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    data, scale = quantize(weight, "fp8", 64, np.dtype(np.float16))
    back = dequantised(data, scale, weight.shape, "fp8", 64).astype(np.float32)
    large = np.abs(weight) > 0.05
    assert (np.abs(back - weight) <= np.abs(weight) * 2**-4 * 1.01)[large].all()


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "fp16"), ("int4", "fp16"), ("int4", "bf16"), ("fp8", "bf16")])
def test_an_engine_with_quantised_weights(decoder, tmp_path, kind, dtype):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype=dtype)
    options = BuildOptions(targets=("sm89", "sm120"), capacity=32, prefill=8, quantize=kind)
    (built,) = build(bundle, options)
    assert built.record.file == f"attention.static.{dtype}.last.s32.{kind}.engine"
    assert built.record.network.dequantised_weights == 14  # 7 linear layers in each of 2; not the head
    assert built.record.recipe.quantize == kind


def test_weights_quantised_for_onnx_runtime_are_refused(decoder, tmp_path):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="fp16")
    bundle = dataclasses.replace(bundle, variants=(dataclasses.replace(bundle.variants[0], quantize="int4"),))
    with pytest.raises(EngineError, match="has int4 weights as ONNX Runtime reads them; export it without --quantize"):
        build(bundle, BuildOptions(backend="tensorrt-rtx", targets=("sm86",)))


@pytest.mark.parametrize(
    ("kind", "target", "least"), [("int4", "sm75", "sm80"), ("fp8", "sm80", "sm89"), ("fp8", "sm86", "sm89")]
)
def test_what_a_target_lacks_is_refused_before_building(decoder, tmp_path, kind, target, least):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="fp16")
    with pytest.raises(EngineError, match=f"{target} lacks {kind}, which starts with {least}"):
        build(bundle, BuildOptions(targets=(target, "sm89"), capacity=32, quantize=kind))
    assert not (tmp_path / "engines").exists()


def test_columns_that_no_block_divides_are_refused_before_building(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.decoder(), "attention", dtype="fp16")
    with pytest.raises(EngineError, match=r"variant v has the intermediate size 40, which is no multiple of 16; its weights"):
        build(bundle, BuildOptions(targets=("sm89",), capacity=32, quantize="int8"))
    assert not (tmp_path / "engines").exists()


def test_a_dequantised_weight_that_goes_elsewhere_is_refused(api, decoder, tmp_path):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="fp16")
    (part,) = parts_of(bundle.variants[0])
    source = open_source(bundle, part, 1, 32)
    count = len(quantize_weights(source, "int8", "fp16"))
    node = next(n for n in source.model.graph.node if n.op_type == "Gemm" and n.name.endswith("layers.1/mlp/down_proj/Gemm"))
    twice = helper.make_node("Add", [node.input[1], node.input[1]], ["twice"], name="twice")
    source.model.graph.node.insert(list(source.model.graph.node).index(node), twice)
    node.input[1] = "twice"
    network = Network(api.trt, parse(api, source, Messages()).definition, source.numbers())
    with pytest.raises(GraphError, match=r"dequantised weight .*down_proj.* goes into ELEMENTWISE, planned a product"):
        verify(network, part, part.sizes(1, 32), count)


def test_a_weight_left_as_it_was_is_refused(api, decoder, tmp_path):
    """One dequantisation fewer than planned, as where a parser folds it."""
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="fp16")
    (part,) = parts_of(bundle.variants[0])
    source = open_source(bundle, part, 1, 32)
    count = len(quantize_weights(source, "int8", "fp16"))
    network = Network(api.trt, parse(api, source, Messages()).definition, source.numbers())
    with pytest.raises(GraphError, match=f"there are {count} dequantised weights, planned {count + 1}"):
        verify(network, part, part.sizes(1, 32), count + 1)
