"""A bare config.json: random weights that depend on the seed alone."""

from __future__ import annotations

import json

import pytest
import torch

from exporter.checkpoint import expected_shapes, open_source, write_checkpoint
from exporter.checkpoint.random_weights import BLOCK_VALUES, RandomTensor
from exporter.errors import CheckpointError


@pytest.fixture
def config_file(saved):
    def save(name):
        folder = saved(name)
        (folder / "model.safetensors").unlink()
        return folder / "config.json"

    return save


def test_values(config_file):
    checkpoint = open_source(config_file("starcoder2"), seed=3)
    assert checkpoint.files == ()
    assert checkpoint.name == "starcoder2"
    assert {name: tensor.shape for name, tensor in checkpoint.weights.items()} == expected_shapes(checkpoint.config)
    weights = {name: tensor.read() for name, tensor in checkpoint.weights.items()}
    assert torch.equal(weights["model.norm.weight"], torch.ones(48))
    assert torch.equal(weights["model.layers.0.mlp.up_proj.bias"], torch.zeros(40))
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(weights["model.layers.1.mlp.down_proj.weight"].std()) == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_the_seed_decides(config_file):
    path = config_file("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    first, again, other = (open_source(path, seed).weights[name] for seed in (1, 1, 2))
    assert torch.equal(first.read(), again.read())
    assert torch.equal(first.read(), first.read())
    assert not torch.equal(first.read(), other.read())


def test_gemma_norms_are_zero_since_one_is_added(config_file):
    assert not open_source(config_file("gemma")).weights["model.norm.weight"].read().any()


def test_blocks_are_small_and_add_up():
    tensor = RandomTensor("x", torch.bfloat16, (BLOCK_VALUES // 1000 + 3, 1000), 0, 0.02)
    blocks = list(tensor.blocks())
    assert [block.numel() for block in blocks] == [BLOCK_VALUES, tensor.nbytes // 2 - BLOCK_VALUES]
    assert torch.equal(torch.cat(blocks).reshape(tensor.shape), tensor.read())
    assert tensor.read().dtype == torch.bfloat16


def test_dtype_of_the_config(config_file, edit):
    path = config_file("llama")
    edit(path.parent, dtype="bfloat16")
    assert {tensor.dtype for tensor in open_source(path).weights.values()} == {torch.bfloat16}
    edit(path.parent, drop=("dtype",))
    assert {tensor.dtype for tensor in open_source(path).weights.values()} == {torch.float32}
    edit(path.parent, dtype="float8")
    with pytest.raises(CheckpointError) as error:
        open_source(path)
    assert str(error.value) == f"{path}: dtype 'float8' is not one of float32, float16, bfloat16"


def test_transformers_loads_it(config_file, tmp_path):
    from transformers import AutoModelForCausalLM

    path = config_file("qwen3")
    write_checkpoint(open_source(path), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_other_sources_open_as_checkpoints(saved):
    folder = saved("llama")
    assert open_source(folder).files == (folder / "model.safetensors",)
    bare = folder.parent / "my-model.json"
    bare.write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    assert open_source(bare).name == "my-model"
    with pytest.raises(CheckpointError) as error:
        open_source(bare, seed=-1)
    assert str(error.value) == "seed -1 is not a whole number from 0 to 2147483647"
