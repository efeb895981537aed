"""Bundles that are damaged or mean harm: an error of the right kind in one line, never a crash, and nothing read outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import hf
import hostile_graphs
import numpy as np
import onnx
import pytest
from building import run
from capi import ARGUMENT, BACKEND, BUNDLE, CAPACITY, MEMORY, Api, Model, RuntimeFailure

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.export import ExportOptions, export


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    options = ExportOptions(patterns=("fused", "grouped"))
    return export(open_checkpoint(hf.save("llama", folder)), folder / "bundle", options).path


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[Any], object]) -> None:
    data = json.loads((bundle / "headpool.json").read_text())
    change(data["variants"][0])
    (bundle / "headpool.json").write_text(json.dumps(data))


def fused(bundle: Path) -> str:
    """Its variant of that pattern."""
    variants = json.loads((bundle / "headpool.json").read_text())["variants"]
    return str(next(variant["name"] for variant in variants if variant["pattern"] == "fused"))


def refused(api: Api, bundle: Path, status: int, message: str, variant: str = "") -> None:
    with pytest.raises(RuntimeFailure, match=message) as caught:
        api.open(bundle, variant)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def cache(variant: Any, index: int = 2) -> Any:
    return variant["inputs"][index]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "parent": (lambda v: v.update(graph="../model.onnx"), "not a file name in its own folder"),
    "absolute": (lambda v: v.update(weights=["/etc/passwd"]), "not a file name in its own folder"),
    "dots": (lambda v: v.update(graph=".."), "not a file name in its own folder"),
    "nul": (lambda v: v.update(graph="model\0.onnx"), "not a file name in its own folder"),
    "missing file": (lambda v: v.update(graph="nothing.onnx"), 'lacks "nothing.onnx"'),
    "no graph": (lambda v: v.pop("graph"), "it lacks graph"),
    "an encoder": (lambda v: v.update(encoder="encoder.onnx", pattern="grouped"), "it lacks encoder_layers"),
    "dtype": (lambda v: v.update(dtype="int4"), 'dtype is "int4"'),
    "cache form": (lambda v: v.update(cache="concat"), 'binding "past_key_values.0.key" is "fp32" '),
    "vocabulary": (lambda v: v["config"].update(vocab_size=99999999), 'binding "logits" is'),
    "huge": (lambda v: v["config"].update(vocab_size=2**40), "not a whole number from 1 to 2147483647"),
    "negative": (lambda v: v["config"].update(max_positions=-1), "not a whole number"),
    "fraction": (lambda v: v["config"].update(num_layers=1.5), "not a whole number"),
    "layers": (lambda v: v["config"].update(num_layers=3), "kv_heads names 2 layers, the model has 3"),
    "heads of a cache": (lambda v: cache(v)["shape"].__setitem__(1, 7), "has other KV heads than its config says"),
    "heads of an output": (lambda v: v["outputs"][1]["shape"].__setitem__(1, 7), "does not belong to"),
    "KV heads": (lambda v: v["config"]["kv_heads"].reverse() or v["config"]["kv_heads"].__setitem__(0, 1), "other KV heads"),
    "the layer of a cache": (lambda v: cache(v).update(layer=2), "has other KV heads than its config says"),
    "rank of a cache": (lambda v: cache(v)["shape"].pop(), "has the shape"),
    "alias": (lambda v: v["outputs"][1].update(alias="input_ids"), "does not belong to"),
    "two names": (lambda v: cache(v).update(name="input_ids"), "does not belong to"),
    "two names of inputs": (lambda v: v["inputs"][1].update(name="input_ids"), "have one name"),
    "a role": (lambda v: cache(v).update(role="weights"), 'has the role "weights"'),
    "kv bytes": (lambda v: v.update(kv_bytes_per_token=1), "kv_bytes_per_token is 1"),
    "a cache less": (lambda v: (v["inputs"].pop(), v["outputs"].pop()), "kv_bytes_per_token is"),
    "text for a list": (lambda v: v.update(inputs="all"), 'inputs is "all", not a list'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_is_not_as_export_writes_it(name: str, bundle: Path, api: Api) -> None:
    change, message = CHANGES[name]
    edit(bundle, change)
    refused(api, bundle, BUNDLE, message + ".*; export the bundle again$")


def test_what_is_not_a_file(bundle: Path, api: Api) -> None:
    os.mkfifo(bundle / "waits")  # for what nobody writes, if it were opened
    edit(bundle, lambda v: v.update(graph="waits"))
    refused(api, bundle, BUNDLE, ': "waits" is no regular file; export the bundle again$')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "headpool.json is damaged"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": 1, "variants": []}', "it has no variants"),
        ('{"schema": 2}', "has schema 2, this headpool reads schema 1"),
        ('{"schema": 1, "variants": [NaN]}', "damaged"),
        ('{"schema": 1, "variants": 1e999}', "damaged"),
        ('{"schema": 1, "variants": ["\xff"]}', "damaged"),
    ],
)
def test_a_manifest_that_is_none(text: str, message: str, bundle: Path, api: Api) -> None:
    (bundle / "headpool.json").write_bytes(text.encode("latin-1"))
    refused(api, bundle, BUNDLE, message)


def test_a_path_that_is_no_bundle(tmp_path: Path, api: Api) -> None:
    refused(api, tmp_path, BUNDLE, "is not a bundle: it has no headpool.json; make one with 'headpool export'")
    refused(api, tmp_path / "nothing", BUNDLE, "does not exist")


def test_sizes_that_the_graph_does_not_have(bundle: Path, api: Api) -> None:
    """A manifest that agrees with itself: the graph has the last word."""

    def change(variant: Any) -> None:
        for binding in (*variant["inputs"], *variant["outputs"]):
            if binding["role"] == "cache":
                binding["shape"][3] *= 1024
        variant["kv_bytes_per_token"] *= 1024

    edit(bundle, change)
    refused(api, bundle, BUNDLE, "is not what headpool.json says; export the bundle again")


def test_names_of_several_lines(bundle: Path, api: Api) -> None:
    edit(bundle, lambda variant: variant.update(name="a\nb", pattern="c\nd"))
    refused(api, bundle, ARGUMENT, "choose from a b", "another")
    nodes = [onnx.helper.make_node("Nothing", ["a"], ["b"])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), bundle / "model.g2.fused.onnx")
    refused(api, bundle, BACKEND, r"cannot run model\.g2\.fused\.onnx \(pattern c d, fp32\)")


def test_links_that_leave_the_folder(bundle: Path, tmp_path: Path, api: Api) -> None:
    weights = bundle / "model.safetensors"
    outside = weights.rename(tmp_path / "outside")
    weights.symlink_to(outside)
    refused(api, bundle, BUNDLE, "is a link that leaves its folder")


@pytest.mark.parametrize("variant", ["g2.fused", "g2.grouped"])
@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_files_that_are_cut_short(variant: str, part: float, bundle: Path, api: Api) -> None:
    file = bundle / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    refused(api, bundle, BUNDLE, r"^model\.safetensors is cut short, it has \d+ bytes; export the bundle again$", variant)
    file.unlink()
    refused(api, bundle, BUNDLE, r' lacks "model\.safetensors"; export the bundle again$', variant)
    file.write_bytes(whole)
    graph = bundle / f"model.{variant}.onnx"
    graph.write_bytes(graph.read_bytes()[: int(graph.stat().st_size * part)])
    refused(api, bundle, BUNDLE, rf"^{graph.name} is damaged; export the bundle again$", variant)


def huge_dimension(model: onnx.ModelProto) -> None:
    (norm,) = [tensor for tensor in model.graph.initializer if tensor.name == "model.layers.0.post_attention_layernorm.weight"]
    norm.dims[0] = 2**62


def heads(count: int) -> Callable[[onnx.ModelProto], None]:
    """Counts that wrap around: 6 modulo 2⁶² and its like pass a check of sizes that are multiplied."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if node.op_type == "FusedAttention"]
        (attribute,) = [attribute for attribute in nodes[0].attribute if attribute.name == "num_heads"]
        attribute.i = count

    return change


def refused_at_first(change: Callable[[onnx.ModelProto], None], message: str, bundle: Path, built: Path) -> None:
    """In a process of its own, so that a crash is one test's, and nothing was set up by another model."""
    (graph,) = bundle.glob("*fused*.onnx")
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializeToString())
    program = (
        "import sys; from pathlib import Path; import numpy as np; from capi import Api\n"
        "api = Api(Path(sys.argv[1]))\n"
        "api.open(Path(sys.argv[2]), sys.argv[3]).session(capacity=30).prefill([np.array([1, 2, 3])])"
    )
    command = [sys.executable, "-c", program, built / "src/libheadpool.so", bundle, fused(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    assert done.returncode == 1, done
    assert "capi.RuntimeFailure: " in done.stderr
    assert message.replace("model.onnx", graph.name) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge_dimension, "ONNX Runtime cannot run model.onnx"),
        (heads(6 - 2**63), "kv_num_heads must divide num_heads, from 1 to 65536"),
        (heads(6 + 2**61), "kv_num_heads must divide num_heads, from 1 to 65536"),
        (heads(0), "kv_num_heads must divide num_heads, from 1 to 65536"),
    ],
    ids=["dimension", "below", "above", "none"],
)
def test_numbers_of_a_graph_that_is_the_first_opened(change: Any, message: str, bundle: Path, built: Path) -> None:
    refused_at_first(change, message, bundle, built)


def test_weights_whose_place_wraps_around(bundle: Path, api: Api) -> None:
    (graph,) = bundle.glob("*fused*.onnx")
    model = onnx.load(graph, load_external_data=False)
    (norm,) = [tensor for tensor in model.graph.initializer if tensor.name == "model.layers.0.post_attention_layernorm.weight"]
    (offset,) = [entry for entry in norm.external_data if entry.key == "offset"]
    offset.value = str(2**64 - 4)
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(RuntimeFailure) as caught:
        api.open(bundle, fused(bundle))
    assert caught.value.status == BUNDLE


def test_texts_for_weights(bundle: Path, built: Path) -> None:
    """In memory a text is an address and a length: taken from a file, they would be whatever it says, and be read."""
    (bundle / "texts").write_bytes(struct.pack("<4Q", 8, 64, 0, 0) * 64)

    def change(model: onnx.ModelProto) -> None:
        texts = onnx.TensorProto(name="texts", data_type=onnx.TensorProto.STRING, dims=[64], raw_data=b"")
        onnx.external_data_helper.set_external_data(texts, "texts", 0, 64 * 32)
        model.graph.initializer.append(texts)
        model.graph.node.append(onnx.helper.make_node("Gather", ["texts", "input_ids"], ["read"]))

    refused_at_first(change, "model.onnx is damaged; export the bundle again", bundle, built)


@pytest.fixture
def concat(tmp_path: Path) -> Path:
    return export(open_checkpoint(hf.save("llama", tmp_path)), tmp_path / "concat", ExportOptions(cache="concat")).path


@pytest.mark.parametrize(("fixture", "pattern", "count"), [("bundle", "fused", 150), ("concat", "grouped", 50)])
def test_mutated_graphs(
    fixture: str, pattern: str, count: int, built: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Anything in a graph changed: the runtime refuses it or answers, in a process each, which must not crash."""
    bundle = Bundle.open(request.getfixturevalue(fixture))
    (variant,) = [variant for variant in bundle.variants if variant.pattern == pattern]
    graph = bundle.graph_path(variant)
    files = hostile_graphs.write(graph, count, tmp_path / "mutations")
    output = run(built / "tests/hostile", bundle.path, variant.name, graph.name, *files)
    answered, refused, failed = map(int, re.findall(r"(\d+) (?:answered|refused|failed)", output))
    assert (answered + refused, failed) == (count, 0)
    assert answered > count / 20  # as many show nothing that matters
    assert refused > count / 2


@pytest.mark.parametrize("extra", [1, 2])
def test_tensors_that_begin_at_any_byte(extra: int, bundle: Path, api: Api) -> None:
    """As in a safetensors file whose header nobody padded."""

    def logits(variant: str) -> np.ndarray:
        return api.open(bundle, variant).session(capacity=30).prefill([np.arange(5, 25)])

    expected = {variant: logits(variant) for variant in ("g2.fused", "g2.grouped")}
    weights = bundle / "model.safetensors"
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    weights.write_bytes((size + extra).to_bytes(8, "little") + data[8 : 8 + size] + b" " * extra + data[8 + size :])
    for graph in bundle.glob("*.onnx"):
        model = onnx.load(graph, load_external_data=False)
        places = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "offset"]
        for place in places:
            place.value = str(int(place.value) + extra)
        assert len(places) > 10
        graph.write_bytes(model.SerializeToString())
    for variant, before in expected.items():
        np.testing.assert_array_equal(logits(variant), before)


def resident(of: str = "RssAnon") -> int:
    """Bytes of this process's own memory that are there."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{of}:")]
    return int(line.split()[1]) * 1024


def test_a_file_that_is_mostly_a_hole(bundle: Path, api: Api) -> None:
    """It costs what lies in it, not what its size says."""
    os.truncate(bundle / "model.safetensors", 2**37)
    before = resident()
    session = api.open(bundle, fused(bundle)).session(capacity=30)
    assert session.prefill([np.arange(5)]).std() > 0.3
    assert resident() - before < 200e6
    os.truncate(bundle / f"model.{fused(bundle)}.onnx", 2**37)
    refused(api, bundle, BUNDLE, "is damaged; export the bundle again$", fused(bundle))


@pytest.mark.parametrize("variant", ["g2.fused", "g2.grouped"])
def test_weights_that_are_no_numbers(variant: str, bundle: Path, api: Api) -> None:
    """No token is picked of their logits."""
    weights = bundle / "model.safetensors"
    data = bytearray(weights.read_bytes())
    np.frombuffer(data, np.float32, offset=8 + int.from_bytes(data[:8], "little"))[:] = np.nan
    weights.write_bytes(data)
    session = api.open(bundle, variant).session(capacity=30)
    with pytest.raises(RuntimeFailure, match="the logits are not finite numbers") as caught:
        session.generate([np.arange(5, 9)], 4)
    assert caught.value.status == BACKEND


@pytest.mark.parametrize("variant", ["g2.fused", "g2.grouped"])
def test_a_bundle_that_is_moved_replaced_or_removed_while_it_is_open(variant: str, bundle: Path, api: Api) -> None:
    def logits(*models: Model) -> list[np.ndarray]:
        return [model.session(capacity=30).prefill([np.arange(5, 25)]) for model in models]

    opened = api.open(bundle, variant)
    expected, moved = logits(opened)[0], bundle.with_name("moved")
    bundle.rename(moved)
    np.testing.assert_array_equal(logits(opened)[0], expected)
    shutil.copytree(moved, bundle)
    weights = bundle / "model.safetensors"
    data = bytearray(weights.read_bytes())
    floats = np.frombuffer(data, np.float32, offset=8 + int.from_bytes(data[:8], "little"))
    floats *= 0.9
    weights.write_bytes(data)
    other = api.open(bundle, variant)
    first, second = logits(opened, other)
    np.testing.assert_array_equal(first, expected)
    assert np.abs(second - expected).max() > 0.1
    shutil.rmtree(moved)
    np.testing.assert_array_equal(logits(opened)[0], expected)


@pytest.mark.parametrize("variant", ["g2.fused", "g2.grouped"])
def test_memory_that_ends(variant: str, bundle: Path, built: Path) -> None:
    """Before ONNX Runtime begins, and while it reads the graph; it ends processes itself where it has none to start threads."""
    command = (Path(__file__).with_name("starved.py"), built / "src/libheadpool.so", bundle, variant, 0.4, 0.8, 1.2, 1.6, 1000)
    ends = json.loads(run(sys.executable, *command).splitlines()[0])
    assert ends == [MEMORY] * 5 + [0]


def test_random_changes_of_a_manifest(bundle: Path, api: Api) -> None:
    """Any value for any other: what opens must also run."""
    values = [7, "batch", "static", "concat", "fp16", "input_ids"]
    statuses = damage.statuses(api, bundle, bundle / "headpool.json", values, lambda data: data["variants"][0])
    assert set(statuses) <= {0, ARGUMENT, BUNDLE, CAPACITY, BACKEND, MEMORY}
    assert 0 < statuses.count(0) < 250  # some values mean nothing to the runtime


def test_how_weights_are_stored_that_nobody_knows(bundle: Path, api: Api) -> None:
    edit(bundle, lambda variant: variant.update(quantize="int2"))
    refused(api, bundle, BUNDLE, '^headpool.json is damaged: quantize is "int2"; export the bundle again$')
    edit(bundle, lambda variant: variant.pop("quantize"))  # as older exports wrote it
    assert api.open(bundle).info().quantize == b""


def test_how_caches_are_stored_that_nobody_knows(bundle: Path, api: Api) -> None:
    edit(bundle, lambda variant: variant.update(cache_dtype="int4"))
    refused(api, bundle, BUNDLE, '^headpool.json is damaged: cache_dtype is "int4"; export the bundle again$')
    edit(bundle, lambda variant: variant.update(cache_dtype="int8"))
    refused(api, bundle, BUNDLE, 'binding "past_key_values.0.key" is "fp32"')
    edit(bundle, lambda variant: variant.update(pattern="grouped"))
    refused(api, bundle, BUNDLE, "a cache_dtype is for pattern fused, static; export the bundle again$")
    edit(bundle, lambda variant: (variant.pop("cache_dtype"), variant.update(pattern="fused")))  # as older exports wrote it
    assert api.open(bundle).info().cache_dtype == b""


def test_names_of_folders_of_several_lines(bundle: Path, tmp_path: Path, api: Api) -> None:
    """Every message is one line, and a path in it is not maimed otherwise."""
    refused(api, tmp_path / "a\nb\x1b[31mé", BUNDLE, r"/a b \[31mé is not a bundle: it does not exist; make one with")
    moved = bundle.rename(tmp_path / "of\ntwo lines")
    (moved / "model.safetensors").unlink()
    refused(api, moved, BUNDLE, r'/of two lines lacks "model\.safetensors"; export the bundle again$')
