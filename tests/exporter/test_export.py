"""The export stage: valid graphs, weights once, the manifest's truth."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
from pathlib import Path

import hf
import onnx
import onnxruntime
import pytest
import tiny
from safetensors.torch import load_file

from exporter import trace
from exporter.bundle import Bundle
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.export import ExportOptions, export
from graphs.errors import GraphError
from graphs.verify import check_model

PATTERNS = ("repeat", "grouped", "attention", "gqa")
ORT_DTYPES = {"fp32": "tensor(float)", "fp16": "tensor(float16)", "int64": "tensor(int64)"}


@pytest.fixture(scope="module")
def bundles(saved: Path, tmp_path_factory) -> list[Bundle]:
    """Every pattern, cache form and group count."""
    out = tmp_path_factory.mktemp("bundles")
    return [
        export(open_checkpoint(saved), out / "static", ExportOptions((6, 2, 1), patterns=PATTERNS, cache="static")),
        export(open_checkpoint(saved), out / "concat", ExportOptions((2,), patterns=PATTERNS, cache="concat")),
        export(open_checkpoint(saved), out / "half", ExportOptions(patterns=PATTERNS, dtype="fp16", logits="all")),
    ]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_every_graph_passes_the_full_check_and_has_no_canonical_node(bundles: list[Bundle]) -> None:
    for bundle in bundles:
        for variant in bundle.variants:
            onnx.checker.check_model(str(bundle.graph_path(variant)), full_check=True)
            model = onnx.load(bundle.graph_path(variant), load_external_data=False)
            domains = {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import}
            assert "headpool" not in domains
            assert ("com.microsoft" in domains) == (variant.pattern == "gqa")


def test_node_names_are_hierarchical_and_unique(bundles: list[Bundle]) -> None:
    for bundle in bundles:
        for variant in bundle.variants:
            names = [node.name for node in onnx.load(bundle.graph_path(variant), load_external_data=False).graph.node]
            assert len(set(names)) == len(names)
            assert all(name.startswith("/model/") for name in names)
            for layer in range(2):
                for part in ("self_attn/q_proj", "mlp/down_proj", "input_layernorm"):
                    assert any(name.startswith(f"/model/layers.{layer}/{part}/") for name in names)


def test_weights_are_named_and_lie_outside_the_graph(bundles: list[Bundle], checkpoint: Checkpoint) -> None:
    for bundle in bundles:
        for variant in bundle.variants:
            model = onnx.load(bundle.graph_path(variant), load_external_data=False)
            outside = {tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
            assert outside == set(checkpoint.weights)
            inside = [tensor for tensor in model.graph.initializer if tensor.name not in outside]
            assert sum(len(tensor.raw_data) for tensor in inside) < 1024
            files = {
                entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
            }
            assert files == set(variant.weights)


def test_the_manifest_is_what_the_runtime_finds(bundles: list[Bundle]) -> None:
    for bundle in bundles:
        manifest = json.loads((bundle.path / "headpool.json").read_text())
        assert manifest["source"]["name"] == "llama"
        assert set(manifest["tools"]) == {"headpool", "torch", "onnx", "onnx-ir", "onnxscript"}
        for variant in manifest["variants"]:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            runtime = onnxruntime.InferenceSession(str(bundle.path / variant["graph"]), options)
            for key, found in (("inputs", runtime.get_inputs()), ("outputs", runtime.get_outputs())):
                assert [(b["name"], ORT_DTYPES[b["dtype"]], b["shape"]) for b in variant[key]] == [
                    (value.name, value.type, list(value.shape)) for value in found
                ]


def test_the_manifest_names_the_checkpoint_and_the_conversion(bundles: list[Bundle], saved: Path) -> None:
    assert bundles[0].source["sha256"] == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    records = {variant.name.split(".")[0]: variant.conversion for variant in bundles[0].variants}
    assert records["g2"] is None
    assert records["g1"] == {"method": "mean", "seed": None, "kv_heads_before": [2, 2], "kv_heads_after": [1, 1]}
    names = [variant.name for variant in bundles[0].variants]
    assert names == [f"g{count}.{pattern}" for count in (6, 2, 1) for pattern in PATTERNS]


def test_weight_bytes_are_what_a_step_reads(bundles: list[Bundle], checkpoint: Checkpoint, tmp_path: Path) -> None:
    """All weights, but of an untied embedding; a tied one is the head and counts."""
    everything = sum(tensor.nbytes for tensor in checkpoint.weights.values())
    assert bundles[1].variants[0].weight_bytes == everything - 67 * 48 * 4
    assert bundles[2].variants[0].weight_bytes == (everything - 67 * 48 * 4) // 2
    tied = open_checkpoint(hf.save("llama-tied-biased", tmp_path))
    bundle = export(tied, tmp_path / "tied", ExportOptions())
    assert bundle.variants[0].weight_bytes == sum(tensor.nbytes for tensor in tied.weights.values())


def test_side_files_are_hugging_faces_and_genais(bundles: list[Bundle], saved: Path) -> None:
    folder = bundles[0].path
    assert (folder / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    original = json.loads((saved / "config.json").read_text())
    assert config.items() >= {**original, "num_key_value_heads": 6}.items()  # the first variant's
    genai = json.loads((folder / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert decoder["filename"] == bundles[0].variants[0].graph
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (6, 6, 8)
    assert genai["search"]["past_present_share_buffer"] is True
    assert set(decoder["inputs"].values()) == {
        "input_ids",
        "position_ids",
        "past_key_values.%d.key",
        "past_key_values.%d.value",
    }
    concat = json.loads((bundles[1].path / "genai_config.json").read_text())
    assert concat["search"]["past_present_share_buffer"] is False
    assert concat["model"]["decoder"]["inputs"]["attention_mask"] == "attention_mask"


def test_six_group_counts_take_little_more_than_one(tmp_path: Path) -> None:
    """Only K and V are written again: at most 1.35 times one variant, in SmolLM2's proportions."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 12, "num_key_value_heads": 12}
    config = {"model_type": "llama", "vocab_size": 32768, "num_hidden_layers": 2, "max_position_embeddings": 512, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    source = open_source(tmp_path / "config.json")
    one = export(source, tmp_path / "one", ExportOptions())
    six = export(source, tmp_path / "six", ExportOptions(groups=(12, 6, 4, 3, 2, 1)))
    assert size(tmp_path / "six") <= 1.35 * size(tmp_path / "one")
    assert one.source["sha256"] is None  # random weights have no file
    for variant in six.variants:
        assert variant.weights == (f"model.g{variant.groups}.safetensors", "model.safetensors")
    shared = load_file(tmp_path / "six" / "model.safetensors")
    assert not any("k_proj" in name or "v_proj" in name for name in shared)
    assert set(load_file(tmp_path / "six" / "model.g3.safetensors")) == {
        f"model.layers.{layer}.self_attn.{letter}_proj.weight" for layer in range(2) for letter in "kv"
    }


def test_the_check_finds_weights_that_are_not_there(bundles: list[Bundle], tmp_path: Path) -> None:
    bundle = bundles[1]
    graph = tmp_path / "model.onnx"
    graph.write_bytes(bundle.graph_path(bundle.variants[0]).read_bytes())
    with pytest.raises(GraphError, match=r"model.onnx: weight .* needs \d+ bytes at \d+ of model.safetensors"):
        check_model(graph)
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].op_type = "Nonsense"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"model.onnx is not valid ONNX: No Op registered for Nonsense"):
        check_model(graph)


def test_the_check_is_the_full_one(bundles: list[Bundle], tmp_path: Path) -> None:
    """A type that contradicts the nodes is found by inference alone; a weight outside the folder by no checker."""
    bundle = bundles[1]
    for name in os.listdir(bundle.path):
        os.link(bundle.path / name, tmp_path / name)
    graph = tmp_path / "model.onnx"
    model = onnx.load(bundle.graph_path(bundle.variants[0]), load_external_data=False)
    whole = model.SerializeToString()
    graph.write_bytes(whole)
    check_model(graph)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"model.onnx is not valid ONNX: .*nference"):
        check_model(graph)
    model = onnx.load_from_string(whole)
    entry = next(e for weight in model.graph.initializer for e in weight.external_data if e.key == "location")
    entry.value = f"../{tmp_path.name}/{entry.value}"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"model.onnx: weight .* lies at \.\./.*, outside the bundle's folder"):
        check_model(graph)


def test_parts_share_what_the_tracer_reads_and_leave_it_as_it_was(monkeypatch):
    """torchlib is read once for all parts of a process; the garbage collector works again, whatever came of the trace."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    read, calls = registration.ONNXRegistry.from_torchlib, []

    def counted(*_, **options):
        calls.append(options)
        return read(**options)

    monkeypatch.setattr(registration.ONNXRegistry, "from_torchlib", counted)
    trace.epilogue.cache_clear()
    ends = [dataclasses.replace(tiny.CONFIG, hidden_size=size) for size in (32, 40)]
    shapes = [trace.epilogue(end, "fp32", "last").graph.inputs[0].shape for end in ends]
    assert [shape[1] for shape in shapes] == [32, 40]
    assert len(calls) == 1
    assert registration.ONNXRegistry.from_torchlib is counted
    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        trace.trace_part(lambda: (_ for _ in ()).throw(RuntimeError("no module")), "fp32", [])
    assert gc.isenabled()
