"""The bundle's manifest: what it says is true of the graphs, and whatever is wrong with it is one BundleError."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import hf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.bundle import MANIFEST, Bundle
from exporter.checkpoint import open_checkpoint
from exporter.engines import open_session
from exporter.errors import BundleError, EngineError
from exporter.export import ExportOptions, export


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A bundle of two variants with weights of their own."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = open_checkpoint(hf.save("llama", folder))
    export(checkpoint, folder / "out", ExportOptions(groups=(2, 1), patterns=("grouped",)))
    return folder / "out"


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


@pytest.fixture
def edit(bundle: Path):
    """Sets the manifest's value at a path of keys; None as a value deletes the key."""

    def change(*keys: Any, value: Any) -> Path:
        data = json.loads((bundle / MANIFEST).read_text())
        place = data
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (bundle / MANIFEST).write_text(json.dumps(data))
        return bundle

    return change


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as error:
        Bundle.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(whole: Path) -> None:
    bundle = Bundle.open(whole)
    assert bundle.to_json() == json.loads((whole / MANIFEST).read_text())
    assert [variant.name for variant in bundle.variants] == ["g2", "g1"]
    assert bundle.variant() is bundle.variants[0]
    assert bundle.variant("g1").groups == 1
    assert bundle.variant("g1").kv_bytes_per_token == 2 * 1 * 2 * 8 * 4
    assert bundle.graph_path(bundle.variant("g1")) == whole / "model.g1.onnx"
    with pytest.raises(BundleError, match="variant 'g3' is not one of g2, g1"):
        bundle.variant("g3")


VARIANT = ("variants", 1)
DAMAGE = [
    (("schema",), 2, "has schema 2, this headpool reads schema 1; export it again"),
    (("schema",), "1", "has schema '1', this headpool reads schema 1; export it again"),
    (("variants",), [], "is damaged: its variants are none; there must be some, each with a name of its own"),
    (("variants",), 7, "is damaged: TypeError: 'int' object is not iterable"),
    (VARIANT, None, "is damaged: AttributeError: 'NoneType' object has no attribute 'get'"),
    ((*VARIANT, "name"), "g2", "is damaged: its variants are g2, g2; there must be some, each with a name of its own"),
    ((*VARIANT, "name"), "", "is damaged: variant '' has no name or a negative number of bytes"),
    ((*VARIANT, "name"), 5, "is damaged: variant.name is 5: input should be a valid string"),
    ((*VARIANT, "extra"), 5, "is damaged: variant.extra is an unknown key"),
    (
        (*VARIANT, "weights"),
        "model.safetensors",
        "is damaged: variant.weights is 'model.safetensors': input should be a valid array",
    ),
    ((*VARIANT, "weights"), [1], "is damaged: variant.weights[0] is 1: input should be a valid string"),
    ((*VARIANT, "weight_bytes"), -1, "is damaged: variant 'g1' has no name or a negative number of bytes"),
    ((*VARIANT, "weight_bytes"), 1.5, "is damaged: variant.weight_bytes is 1.5: input should be a valid integer"),
    ((*VARIANT, "cache"), "ring", "is damaged: variant.cache is 'ring': input should be 'concat' or 'static'"),
    ((*VARIANT, "logits"), "none", "is damaged: variant.logits is 'none': input should be 'last' or 'all'"),
    ((*VARIANT, "dtype"), "int8", "is damaged: dtype 'int8' is not one of fp32, fp16, bf16"),
    (
        (*VARIANT, "dtype"),
        "fp16",
        "is damaged: variant 'g1': its kv_bytes_per_token are not what the contract says for this config",
    ),
    (
        (*VARIANT, "inputs", 0, "name"),
        "ids",
        "is damaged: variant 'g1': its inputs are not what the contract says for this config",
    ),
    ((*VARIANT, "outputs"), [], "is damaged: variant 'g1': its outputs are not what the contract says for this config"),
    ((*VARIANT, "conversion"), [], "is damaged: variant.conversion is []: input should be an object"),
    (
        (*VARIANT, "config", "kv_heads"),
        [1, 4],
        "is damaged: layer 1: 4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1",
    ),
    (
        (*VARIANT, "config", "eos_token_ids"),
        ["x"],
        "is damaged: variant.config.eos_token_ids[0] is 'x': input should be a valid integer",
    ),
    (("source",), [], "is damaged: source is []: input should be an object"),
    (("tools",), {"torch": 2}, "is damaged: tools.torch is 2: input should be a valid string"),
]


@pytest.mark.parametrize(("keys", "value", "message"), DAMAGE, ids=[f"{'.'.join(map(str, d[0]))}={d[1]!r}" for d in DAMAGE])
def test_damaged(keys, value, message, edit) -> None:
    path = edit(*keys, value=value)
    assert refusal(path) == f"{path / MANIFEST} {message}"


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b", ".", "..", "", "x" * 300, "a\0b"])
@pytest.mark.parametrize("key", ["graph", "weights"])
def test_names_that_are_no_file_of_the_bundle(key, name, edit) -> None:
    path = edit("variants", 0, key, value=name if key == "graph" else [name])
    assert refusal(path).startswith(f"{path / MANIFEST} is damaged: it names ")


def test_a_file_that_is_gone(bundle: Path) -> None:
    (bundle / "model.g1.safetensors").unlink()
    assert refusal(bundle) == f"{bundle / MANIFEST} is damaged: it names model.g1.safetensors, which {bundle} lacks"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"schema": NaN}', b"[" * 100_000, b'{"a": "\\ud800"}']
)
def test_a_manifest_that_is_no_manifest(text: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(text)
    assert refusal(bundle).startswith(f"{bundle / MANIFEST} ")


def test_no_bundle_at_all(tmp_path: Path, bundle: Path) -> None:
    make = "make one with 'headpool export'"
    assert refusal(tmp_path / "no") == f"{tmp_path}/no is not a bundle: it does not exist; {make}"
    assert refusal(bundle / MANIFEST) == f"{bundle}/headpool.json is not a bundle: it is a file; {make}"
    assert refusal(bundle / MANIFEST / "x") == f"{bundle}/headpool.json/x is not a bundle: it does not exist; {make}"
    (bundle / MANIFEST).unlink()
    assert refusal(bundle) == f"{bundle} is not a bundle: it has no headpool.json; {make}"
    os.mkdir(bundle / MANIFEST)
    assert "Is a directory" in refusal(bundle)


def places(data: Any, path: tuple[Any, ...] = ()):
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*path, key))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["model.g1.onnx", "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_any_change_is_refused_or_leaves_a_bundle_that_can_be_read(data, whole: Path, bundle: Path) -> None:
    from exporter.inspection import inspect, render

    manifest = json.loads((whole / MANIFEST).read_text())
    changed = copy.deepcopy(manifest)
    path = data.draw(st.sampled_from(list(places(manifest))[1:]))
    place = changed
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(ANYTHING)
    else:
        del place[path[-1]]
    (bundle / MANIFEST).write_text(json.dumps(changed))
    try:
        opened = Bundle.open(bundle)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017  it need not be refused
    else:
        assert {name for v in opened.variants for name in (v.graph, *v.weights)} <= set(os.listdir(bundle))
        json.dumps(inspect(bundle))
        "\n".join(render(inspect(bundle))).encode()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(cut=st.none() | st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3))
def test_a_cut_or_flipped_manifest(cut, flips, whole: Path, bundle: Path) -> None:
    data = bytearray((whole / MANIFEST).read_bytes())
    for where, change in flips:
        data[int(where * (len(data) - 1))] ^= change
    (bundle / MANIFEST).write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        Bundle.open(bundle)
    except BundleError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  it need not be refused


# Damage that only the runtime sees


def session_refusal(path: Path, variant: str = "g2") -> str:
    with pytest.raises(EngineError) as error:
        open_session(Bundle.open(path), variant, capacity=8, threads=1)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_truncated_graph(keep: int, bundle: Path) -> None:
    data = (bundle / "model.g2.onnx").read_bytes()
    (bundle / "model.g2.onnx").write_bytes(data[:keep])
    assert "cannot run model.g2.onnx" in session_refusal(bundle)


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_truncated_weights(keep: int, bundle: Path) -> None:
    data = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(data[:keep])
    assert "cannot run model.g2.onnx" in session_refusal(bundle)


def test_a_graph_of_another_bundle(bundle: Path) -> None:
    shutil.copy(bundle / "model.g1.onnx", bundle / "model.g2.onnx")
    assert session_refusal(bundle) == (
        f"{bundle}/model.g2.onnx has other inputs than its manifest says; it belongs to another bundle, export it again"
    )


def test_weights_that_are_no_numbers(bundle: Path) -> None:
    data = bytearray((bundle / "model.safetensors").read_bytes())
    data[-4000:] = b"\xff" * 4000
    (bundle / "model.safetensors").write_bytes(data)
    from exporter.generate import generate

    with (
        open_session(Bundle.open(bundle), "g2", capacity=8, threads=1) as session,
        pytest.raises(EngineError, match="logits are not finite numbers: its weights hold NaN"),
    ):
        next(generate(session, [np.array([1, 2])], 4))
