"""The export stage: valid graphs, weights once, links, the manifest's truth, and nothing left behind when it fails."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import exporter.export as stage
from exporter.background import Background
from exporter.bundle import Bundle
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source, scan
from exporter.errors import UserError
from exporter.export import ExportOptions, export
from exporter.files import new_file, new_folder, refuse_existing
from exporter.weights import ComputedTensor
from graphs.errors import GraphError
from graphs.verify import check_model

spec = importlib.util.spec_from_file_location("exporter_hf", Path(__file__).with_name("hf.py"))
assert spec is not None
assert spec.loader is not None
hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf)

PATTERNS = ("repeat", "grouped", "attention", "gqa")
ORT_DTYPES = {"fp32": "tensor(float)", "fp16": "tensor(float16)", "int64": "tensor(int64)"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = hf.save("llama", tmp_path_factory.mktemp("saved"))
    hf.add_tokenizer(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path) -> Checkpoint:
    return open_checkpoint(saved)


@pytest.fixture(scope="module")
def bundles(saved: Path, tmp_path_factory) -> list[Bundle]:
    """Every pattern, cache form and group count."""
    out = tmp_path_factory.mktemp("bundles")
    return [
        export(open_checkpoint(saved), out / "static", ExportOptions((6, 2, 1), patterns=PATTERNS, cache="static")),
        export(open_checkpoint(saved), out / "concat", ExportOptions((2,), patterns=PATTERNS, cache="concat")),
        export(open_checkpoint(saved), out / "half", ExportOptions(patterns=PATTERNS, dtype="fp16", logits="all")),
    ]


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file's content, size, times and mode."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
    }


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


# Links


def test_links_write_almost_nothing(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    before = snapshot(saved)
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(groups=(2, 1), storage="link"))
    assert (tmp_path / "out" / "model.safetensors").samefile(saved / "model.safetensors")
    own = [path for path in (tmp_path / "out").glob("*.safetensors") if path.stat().st_nlink == 1]
    assert [path.name for path in own] == ["model.g1.safetensors"]
    assert snapshot(saved) == before
    for variant in bundle.variants:
        check_model(bundle.graph_path(variant))
    check_against = export(checkpoint, tmp_path / "copy", ExportOptions(groups=(2, 1)))
    assert [v.weight_bytes for v in bundle.variants] == [v.weight_bytes for v in check_against.variants]


def test_shards_that_are_symbolic_links_are_linked_to_their_files(saved: Path, tmp_path: Path) -> None:
    """A Hugging Face cache holds links to blobs; ONNX Runtime would refuse the links themselves."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in saved.iterdir():
        (cache / path.name).symlink_to(path)
    bundle = export(open_checkpoint(cache), tmp_path / "out", ExportOptions(storage="link"))
    assert not (bundle.path / "model.safetensors").is_symlink()
    assert (bundle.path / "model.safetensors").samefile(saved / "model.safetensors")


def test_another_dtype_is_copied_also_with_links(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(storage="link", dtype="fp16"))
    assert all(path.stat().st_nlink == 1 for path in bundle.path.iterdir())


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_link_that_cannot_be_made(number: int, checkpoint: Checkpoint, saved: Path, tmp_path: Path, monkeypatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError) as error:
        export(checkpoint, tmp_path / "out", ExportOptions(storage="link"))
    assert str(error.value) == (
        f"{saved}/model.safetensors cannot be hard-linked beside the bundle ({os.strerror(number)}); use --weights copy"
    )
    assert not list(tmp_path.iterdir())


# Failures


@pytest.mark.parametrize("storage", ["copy", "link"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, storage: Any, saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(state, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out", ExportOptions(storage=storage))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_values_beyond_half_precision(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.norm.weight"
    weights = {**checkpoint.weights, name: ComputedTensor(name, torch.float32, (48,), lambda: torch.full((48,), 1e5))}
    with pytest.raises(UserError, match=r"tensor 'model.norm.weight' has values beyond the range of torch.float16"):
        export(dataclasses.replace(checkpoint, weights=weights), tmp_path / "out", ExportOptions(dtype="fp16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "where", ["write_safetensors", "canonical_graph", "lower", "check_model", "genai_config", "_write_json"]
)
@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_nothing_is_left_of_a_failure(
    failure, where: str, checkpoint: Checkpoint, saved: Path, tmp_path: Path, monkeypatch
) -> None:
    before = snapshot(saved)

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(
        "exporter.layout.write_safetensors" if where == "write_safetensors" else f"exporter.export.{where}", fail
    )
    with pytest.raises((KeyboardInterrupt, UserError)) as error:
        export(checkpoint, tmp_path / "out", ExportOptions(groups=(2, 1)))
    if isinstance(failure, OSError):
        assert str(error.value) == f"{tmp_path}/out cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())
    assert snapshot(saved) == before


def test_an_interrupt_does_not_wait_for_the_hash(checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    """Hashing 16 GB takes its time; Ctrl-C ends at once."""
    release = threading.Event()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "scan", lambda files: release.wait(30))
    monkeypatch.setattr(stage, "_write_graphs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", ExportOptions())
    assert not release.is_set()
    release.set()
    assert not list(tmp_path.iterdir())


def test_background_gives_what_came_of_it() -> None:
    assert Background(lambda a, b: a + b, 2, b=3).result() == 5

    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Background(fail).result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("fused",)}, "pattern 'fused' is not one of repeat, grouped, attention, gqa"),
        ({"patterns": ()}, "patterns : name each once, and at least one"),
        ({"patterns": ("gqa", "gqa")}, "patterns gqa, gqa: name each once, and at least one"),
        ({"groups": (3, 3)}, "group counts 3, 3: name each once, and at least one"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of fp32, fp16, bf16"),
        ({"cache": "ring"}, "cache 'ring' is not one of concat, static"),
        ({"logits": "some"}, "logits 'some' is not one of last, all"),
        ({"method": "sum"}, "method 'sum' is not one of mean, first, random"),
        ({"storage": "move"}, "weights 'move' is not one of copy, link"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ExportOptions(**options)
    assert str(error.value) == message


def test_refusals_come_before_the_work(checkpoint: Checkpoint, saved: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "scan", lambda files: pytest.fail("the work has begun"))
    for out, message in (
        (saved, f"{saved} exists; choose another name or remove it"),
        (tmp_path / "no" / "out", f"{tmp_path}/no/out cannot be written: {tmp_path}/no is not a folder"),
        (saved / "config.json" / "out", f"{saved}/config.json is not a folder; make it first, or choose another place"),
    ):
        with pytest.raises(UserError) as error:
            export(checkpoint, out, ExportOptions())
        assert message in str(error.value)
    with pytest.raises(UserError, match="4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"):
        export(checkpoint, tmp_path / "out", ExportOptions(groups=(2, 4)))
    assert not list(tmp_path.iterdir())


# Outputs, whole or absent


def test_an_output_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out exists"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="file exists"), new_file(tmp_path / "file"):
        (tmp_path / "file").write_text("theirs")
    assert (tmp_path / "file").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_dangling_link_counts_as_an_output(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="out exists"):
        refuse_existing(tmp_path / "out")


def test_errors_name_the_output_and_not_its_temporary_sibling(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError) as error,
        new_folder(tmp_path / "out") as outer,
        new_folder(outer / "bundle") as inner,
        new_file(inner / "model.safetensors"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(error.value) == f"{tmp_path}/out/bundle/model.safetensors cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())


# The check of a written graph


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


def test_scan_is_the_hash_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two" * 1_000_000)
    assert scan((tmp_path / "a", tmp_path / "b")) == hashlib.sha256(b"one" + b"two" * 1_000_000).hexdigest()
