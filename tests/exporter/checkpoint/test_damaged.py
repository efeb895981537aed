"""Folders and files that are no checkpoint, or a damaged one, and the one line that says so."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporter.checkpoint import open_checkpoint, open_source
from exporter.errors import CheckpointError


def test_an_index_of_tensors_that_no_shard_holds(saved):
    folder = saved("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["nonsense.weight"] = next(iter(data["weight_map"].values()))
    index.write_text(json.dumps(data))
    assert refusal(folder) == f"{index} names tensors that its shards do not hold: nonsense.weight"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    name=st.sampled_from(["config.json", "generation_config.json", "model.safetensors.index.json"]),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3),
)
def test_cut_and_flipped_json_files(name, cut, flips, models, tmp_path):
    folder = tmp_path / "damaged"
    if not folder.exists():
        models("qwen3").save_pretrained(folder, max_shard_size="20KB")
    whole = (folder / name).read_bytes()
    data = bytearray(whole)
    for where, change in flips:
        data[int(where * (len(data) - 1))] ^= change
    (folder / name).write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  it need not be refused
    finally:
        (folder / name).write_bytes(whole)


def refusal(path, open_it=open_checkpoint):
    with pytest.raises(CheckpointError) as error:
        open_it(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit_are_reported_together(saved):
    folder = saved("llama")
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.k_proj.weight"] = torch.ones(9, 48)
    state["visual.patch.weight"] = torch.ones(1)
    save_file(state, path)
    assert refusal(folder) == (
        f"{folder}: tensors do not fit its config: 2 missing (model.layers.1.mlp.up_proj.weight, model.norm.weight); "
        "1 not part of llama (visual.patch.weight); "
        "1 of the wrong shape (model.layers.0.self_attn.k_proj.weight is [9, 48], its config says [16, 48])"
    )


def test_long_lists_are_cut(saved, edit):
    folder = edit(saved("llama"), num_hidden_layers=4)
    text = refusal(folder)
    assert text.startswith(f"{folder}: tensors do not fit its config: 18 missing (model.layers.2.input_layernorm.weight, ")
    assert text.endswith("and 13 more)")


@pytest.mark.parametrize("name", ["phi3", "gemma"])
def test_a_config_that_contradicts_its_weights(name, saved, edit):
    text = refusal(edit(saved(name), num_key_value_heads=3))
    assert "of the wrong shape" in text
    tensor = {
        "phi3": "qkv_proj.weight is [80, 48], its config says [96, 48]",
        "gemma": "k_proj.weight is [32, 48], its config says [48, 48]",
    }
    assert tensor[name] in text


def test_other_dtypes(saved):
    folder = saved("llama")
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = state["model.norm.weight"].double()
    save_file(state, path)
    assert refusal(folder) == f"{path}: tensor 'model.norm.weight' is F64; headpool reads F32, F16, BF16"


def test_missing_shards(saved):
    folder = saved("llama", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards[1:3]:
        path.unlink()
    names = ", ".join(path.name for path in shards[1:3])
    assert refusal(folder) == f"{folder} lacks 2 of {len(shards)} shards: {names}; download them again"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0"])
def test_an_index_that_points_outside(name, saved):
    folder = saved("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert refusal(folder) == f"{index} names {name}, which is not a file name in its own folder"


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_without_a_map(text, saved):
    folder = saved("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(folder) == f"{index} has no weight_map of tensor names to file names"


def test_a_tensor_in_two_shards(saved):
    folder = saved("llama", max_shard_size="20KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.ones(1)}, second)
    assert refusal(folder) == f"tensor {name!r} stands in both {first} and {second.name}"


def test_folders_and_files_that_are_no_checkpoints(saved, tmp_path):
    forms = "a Hugging Face folder (config.json and safetensors) or a .gguf file"
    assert refusal(tmp_path / "no") == f"{tmp_path}/no does not exist; give {forms}"
    assert refusal(tmp_path / "no.json", open_source) == f"{tmp_path}/no.json does not exist; give {forms}"
    assert refusal(tmp_path) == f"{tmp_path} has no config.json; give a Hugging Face folder, or a .gguf file by its own name"
    (tmp_path / "a.txt").touch()
    assert refusal(tmp_path / "a.txt") == f"{tmp_path}/a.txt is not a checkpoint; give {forms}"
    folder = saved("llama")
    assert refusal(folder / "model.safetensors") == (
        f"{folder}/model.safetensors is a weight file; give the folder that holds it and its config.json"
    )
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder} has no model.safetensors and no model.safetensors.index.json"
    (folder / "pytorch_model.bin").touch()
    assert refusal(folder) == (
        f"{folder} has its weights in pytorch_model.bin only, which can run code when it is read; save it as safetensors "
        "with transformers' save_pretrained"
    )
    (folder / "config.json").write_text("[1]")
    assert refusal(folder) == f"{folder}/config.json is not a JSON object"
    (folder / "config.json").write_bytes(b'{"a": \xff}')
    assert refusal(folder).startswith(f"{folder}/config.json is not JSON: ")
    (folder / "config.json").write_text("[" * 100_000)
    assert refusal(folder).startswith(f"{folder}/config.json is not JSON: ")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(where=st.floats(0, 1), change=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_weight_file(where, change, cut, models, tmp_path):
    """A flipped byte of the header or a cut file: refused in one line, or still read to its end."""
    folder = tmp_path / "damaged"
    if not folder.exists():
        models("phi3").save_pretrained(folder)
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    data = bytearray((folder / "whole").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    place = int(where * (header - 1))
    if cut:
        data = data[: int(where * (len(data) - 1))]
    else:
        data[place] ^= change
    (folder / "model.safetensors").write_bytes(data)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  it need not be refused
    else:
        assert not cut
        for tensor in checkpoint.weights.values():
            tensor.read()
