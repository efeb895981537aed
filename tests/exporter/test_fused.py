"""Bundles in the pattern `fused`: how few nodes there are, sessions over them, and what goes wrong in one line."""

from __future__ import annotations

import _ctypes
import collections
import shutil
import threading
from pathlib import Path
from typing import Any

import harness
import hf
import numpy as np
import onnx
import pytest
import tiny
from test_ort_session import Mirror

from exporter.bundle import Bundle
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.cli import _run
from exporter.engines import huge_pages, open_session, operators
from exporter.errors import EngineError, UserError
from exporter.export import ExportOptions, export
from graphs.verify import check_model

FUSED = ExportOptions(patterns=("fused",))
LAYER = {"LinearChain": 1, "FusedAttention": 1}  # from o to the next layer's q, k and v: norms and sums are in it
NODES = {
    **dict.fromkeys(["llama", "llama-mha-gelu", "qwen2", "phi3", "gemma"], LAYER),
    "qwen3": LAYER | {"RMSNormalization": 2, "Reshape": 2},  # QK-norm is over D
    "starcoder2": {"LayerNormalization": 2, "LinearChain": 3, "FusedAttention": 1},
}


@pytest.fixture
def bundle(checkpoint: Checkpoint, tmp_path: Path) -> Bundle:
    return export(checkpoint, tmp_path / "bundle", FUSED)


@pytest.mark.parametrize("name", NODES)
def test_nodes_of_a_layer(name: str, tmp_path: Path) -> None:
    made = export(open_checkpoint(hf.save(name, tmp_path)), tmp_path / "out", FUSED)
    path = made.graph_path(made.variants[0])
    graph = onnx.load(path, load_external_data=False).graph
    # What all layers share is named after the first of them.
    last = [node.op_type for node in graph.node if node.name.startswith("/model/layers.1/")]
    assert collections.Counter(last) == NODES[name]
    assert len(graph.node) <= 2 * len(last) + 22
    assert len({node.name for node in graph.node}) == len(graph.node)
    check_model(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache": "concat"}, "its cache is concat; headpool's operators work on a static cache"),
        ({"dtype": "fp16"}, "it is fp16; headpool's operators are for fp32"),
        ({"dtype": "bf16"}, "it is bf16; headpool's operators are for fp32"),
    ],
)
def test_what_it_is_not_made_for(changes: dict[str, Any], reason: str, saved: Path, tmp_path: Path, capfd) -> None:
    with pytest.raises(UserError) as caught:
        export(open_checkpoint(saved), tmp_path / "out", ExportOptions(patterns=("grouped", "fused"), **changes), no_work)
    assert str(caught.value) == f"pattern fused does not fit this model: {reason}"
    words = [word for key, value in changes.items() for word in (f"--{key}", value)]
    assert _run(["export", str(saved), str(tmp_path / "out"), "--pattern", "fused", *words]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"headpool: {caught.value}\n")
    assert list(tmp_path.iterdir()) == []


def no_work(*_: Any) -> None:
    raise AssertionError("work was begun")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_session(batch: int, tmp_path: Path) -> None:
    """Prefill in chunks, decoding past rows where the cache grows, more prefill, rewinding; unequal lengths and KV heads."""
    harness.operators()
    model = tiny.decoder()
    made = tiny.bundle(tmp_path, model, "fused")
    for threads in (1, 2):
        with open_session(made, batch=batch, capacity=300, threads=threads, chunk=32) as session:
            mirror = Mirror(session, model)
            mirror.prefill(*(60, 5, 27)[:batch])
            mirror.decode(8)
            mirror.prefill(*(7, 1, 40)[:batch])
            mirror.rewind(11)
            mirror.decode(2)
            session.reset()
            mirror.rows = [row[:0] for row in mirror.rows]
            mirror.prefill(*(1, 1, 1)[:batch])
            mirror.decode(2)


def test_long_contexts_are_split_over_the_threads(tmp_path: Path) -> None:
    """Against the grouped pattern: the torch model's own attention at this length takes too long."""
    harness.operators()
    model = tiny.decoder()
    tokens = [np.random.default_rng(seed).integers(0, 61, length) for seed, length in enumerate((390, 2))]
    results = []
    for pattern in ("fused", "grouped"):
        with open_session(tiny.bundle(tmp_path, model, pattern), batch=2, capacity=400, threads=2) as session:
            results.append([session.prefill(tokens), *(session.decode(np.array([token, 5])) for token in range(4))])
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("position", [-1, 64, 2**40])
def test_a_position_outside_the_cache(position: int, bundle: Bundle) -> None:
    harness.operators()
    with open_session(bundle, capacity=64, threads=1) as session:
        session.prefill([np.arange(5)])
        expected = session.decode(np.array([5])).copy()
        session._step.positions.array[:] = position
        with pytest.raises(EngineError, match=r"onnxruntime failed in a step: .*a position lies outside the cache") as caught:
            session._step.run(session.runtime)
        assert "\n" not in str(caught.value)
        session.rewind(5)
        np.testing.assert_array_equal(session.decode(np.array([5])), expected)


def test_two_sessions_in_two_threads(bundle: Bundle) -> None:
    harness.operators()
    results: dict[int, list[int]] = {}
    start = threading.Barrier(2)

    def generate(index: int) -> None:
        start.wait()
        with open_session(bundle, capacity=100, threads=2) as session:
            tokens = [int(session.prefill([np.arange(3, 20)])[0].argmax())]
            while len(tokens) < 60:
                tokens.append(int(session.decode(np.array(tokens[-1:]))[0].argmax()))
        results[index] = tokens

    threads = [threading.Thread(target=generate, args=[index]) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    generate_alone, start = 2, threading.Barrier(1)
    generate(generate_alone)
    assert results[0] == results[1] == results[generate_alone]
    assert len(set(results[0])) > 3


def test_sessions_share_the_weights_and_free_them(bundle: Bundle) -> None:
    harness.operators()

    def weights() -> list[object]:
        return [file for (path, *_), file in huge_pages._files.items() if path.parent == bundle.path.resolve()]

    first, second = open_session(bundle, threads=1), open_session(bundle, threads=1, batch=2)
    assert len(weights()) == 1
    expected = first.prefill([np.arange(9)]).copy()
    first.close()
    assert len(weights()) == 1
    np.testing.assert_allclose(second.prefill([np.arange(9)] * 2), expected.repeat(2, axis=0), rtol=0, atol=1e-4)
    second.close()
    assert weights() == []


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the operator library is looked for now; there is none."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setattr(operators, "__file__", str(folder / "operators.py"))
    return folder / "libheadpool_ops.so"


def the_one_line(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> str:
    """What `headpool run` says and how it ends, which is what open_session raises."""
    with pytest.raises(EngineError) as caught:
        open_session(bundle)
    capfd.readouterr()
    assert _run(["run", str(bundle.path), "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"headpool: {caught.value}\n")
    return str(caught.value)


def test_without_the_library(bundle: Bundle, elsewhere: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = the_one_line(bundle, capfd)
    assert message.startswith("pattern fused needs headpool's operator library, which was not built here")
    assert "scripts/ops" in message
    assert "grouped" in message


def test_a_library_that_is_none(bundle: Bundle, elsewhere: Path, capfd: pytest.CaptureFixture[str]) -> None:
    elsewhere.write_bytes(b"\x7fELF of another kind" * 100)
    message = the_one_line(bundle, capfd)
    assert message.startswith(f"{elsewhere} does not load (")
    assert message.endswith("delete it and run scripts/ops again")


def test_a_library_of_something_else(bundle: Bundle, elsewhere: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(_ctypes.__file__, elsewhere)
    assert "RegisterCustomOps" in the_one_line(bundle, capfd)


@pytest.mark.parametrize("damage", ["cut", "noise", "type", "place"])
def test_a_damaged_graph(damage: str, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    path = bundle.graph_path(bundle.variants[0])
    content = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    (tensor, *_) = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if damage == "type":
        tensor.data_type = 77
    elif damage == "place":
        next(entry for entry in tensor.external_data if entry.key == "offset").value = "-8"
    content = {"cut": content[: len(content) // 2], "noise": b"\xff" * 1000}.get(damage, model.SerializeToString())
    path.write_bytes(content)
    assert "export the bundle again" in the_one_line(bundle, capfd)


def test_a_weight_whose_length_only_its_shape_says(bundle: Bundle) -> None:
    """ONNX allows that."""
    path = bundle.graph_path(bundle.variants[0])
    with open_session(bundle) as session:
        expected = session.prefill([np.arange(9)])
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in [entry for entry in tensor.external_data if entry.key == "length"]:
            tensor.external_data.remove(entry)
    path.write_bytes(model.SerializeToString())
    with open_session(bundle) as session:
        np.testing.assert_array_equal(session.prefill([np.arange(9)]), expected)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_weights(damage: str, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    harness.operators()
    (weights,) = bundle.path.glob("*.safetensors")
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(EngineError, match="cut short" if damage == "cut" else "No such file") as caught:
        open_session(bundle)
    assert "\n" not in str(caught.value)
