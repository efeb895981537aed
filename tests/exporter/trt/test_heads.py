"""GLU attention in TensorRT: the cache keeps the small V, the fused layer reads it padded, which changes no result."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
import tiny

from exporter.bundle import Bundle
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.heads import one_head_size
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.engines.tensorrt.weights import open_source

CAPACITY = 32


def bundle(tmp_path, value_dim: int, pattern: str, dtype: str) -> Bundle:
    return tiny.bundle(tmp_path, tiny.decoder(dataclasses.replace(tiny.CONFIG, glu_value_dim=value_dim)), pattern, dtype=dtype)


@pytest.mark.parametrize(("pattern", "value_dim", "fused"), [("attention", 8, 2), ("attention", 24, 2), ("grouped", 8, 0)])
def test_engines_have_the_small_cache(tmp_path, pattern, value_dim, fused):
    (built,) = build(
        bundle(tmp_path, value_dim, pattern, "fp16"), BuildOptions(targets=("sm86",), capacity=CAPACITY, prefill=8)
    )
    by_name = {binding.name: binding for binding in built.record.bindings}
    for layer, kv_heads in enumerate(tiny.CONFIG.kv_heads):
        for name in (f"past_key_values.{layer}", f"present.{layer}"):
            assert by_name[f"{name}.key"].shape == (1, kv_heads, CAPACITY, 16)
            assert by_name[f"{name}.value"].shape == (1, kv_heads, CAPACITY, value_dim)
        assert by_name[f"present.{layer}.value"].alias == f"past_key_values.{layer}.value"
    assert built.record.network.fused_attention == fused
    assert built.record.network.cache_updates == 4


@pytest.mark.parametrize("value_dim", [8, 24])
def test_zeros_change_nothing(tmp_path, value_dim):
    """The graph that TensorRT is given, in ONNX Runtime, beside the bundle's own."""
    made = bundle(tmp_path, value_dim, "attention", "fp32")
    (variant,) = made.variants
    padded, plain = (open_source(made, parts_of(variant)[0], 1, CAPACITY) for _ in range(2))
    one_head_size(padded, variant.config)
    assert {node.op_type for node in padded.model.graph.node} - {node.op_type for node in plain.model.graph.node} >= {"Pad"}
    rng, config = np.random.default_rng(0), variant.config
    feeds = {"input_ids": rng.integers(0, config.vocab_size, (1, 3)), "position_ids": np.arange(5, 8)[None]}
    for layer, kv_heads in enumerate(config.kv_heads):
        for name, size in (("key", config.head_dim), ("value", config.value_dim)):
            feeds[f"past_key_values.{layer}.{name}"] = rng.normal(size=(1, kv_heads, CAPACITY, size)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    found, wanted = (
        ort.InferenceSession(source.model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)
        for source in (padded, plain)
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
