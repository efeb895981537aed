"""Linear layers of one norm get norms of their own: other tensors, the very same numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny

from exporter.engines.tensorrt.apart import NORMS, keep_apart
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.weights import open_source


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_no_two_products_share_a_norm_and_nothing_else_changes(decoder, tmp_path, pattern):
    bundle = tiny.bundle(tmp_path, decoder, pattern)
    variant = bundle.variants[0]
    before, after = (open_source(bundle, parts_of(variant)[0], 1, 16) for _ in range(2))
    assert keep_apart(after) == 2 * 3  # K and V beside Q, up beside gate, in each of 2 layers
    graph = after.model.graph
    norms = [node for node in graph.node if node.op_type in NORMS]
    normed = {node.output[0] for node in norms}
    products = Counter(node.input[0] for node in graph.node if node.op_type == "Gemm" and node.input[0] in normed)
    assert set(products.values()) == {1}
    assert len({node.input[1] for node in norms}) == len(norms) == 2 * 2 + 1 + 6
    onnx.checker.check_model(after.model)
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(0, 61, (1, 5)), "position_ids": np.arange(5)[None]}
    for binding in variant.inputs()[2:]:
        shape = [{"batch": 1, "capacity": 16}.get(size, size) for size in binding.shape]
        feeds[binding.name] = rng.standard_normal(shape).astype(np.float32)
    for wanted, found in zip(run(before.model, feeds), run(after.model, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_weights_of_a_norm_are_not_copied(decoder, tmp_path):
    bundle = tiny.bundle(tmp_path, decoder, "attention")
    source = open_source(bundle, parts_of(bundle.variants[0])[0], 1, 16)
    name = next(node.input[1] for node in source.model.graph.node if node.op_type in NORMS)
    data = np.frombuffer(bytes(48 * 4), np.uint8)
    source.place(name, data)
    keep_apart(source)
    twins = [place for other, place in source.places.items() if other.startswith(f"{name}.apart")]
    assert twins == [source.places[name]] * 2
