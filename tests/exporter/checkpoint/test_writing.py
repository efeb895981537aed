"""What is not written, and that a write which fails leaves nothing."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import open_checkpoint, write_checkpoint
from exporter.errors import CheckpointError, UserError
from exporter.weights import ComputedTensor


def test_writing_what_the_family_cannot_say(saved, tmp_path):
    source = open_checkpoint(saved("llama"))
    with pytest.raises(CheckpointError) as error:
        write_checkpoint(
            dataclasses.replace(source, config=dataclasses.replace(source.config, embed_scale=2.0)), tmp_path / "out"
        )
    assert str(error.value) == "a llama config.json cannot say this model's embed_scale"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_nothing(failure, saved, tmp_path):
    source = open_checkpoint(saved("llama"))

    def fail():
        raise failure

    weights = {**source.weights, "model.norm.weight": ComputedTensor("n", torch.float32, (48,), fail)}
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_checkpoint(dataclasses.replace(source, weights=weights), tmp_path / "out", 20_000)
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(UserError) as error:
        write_checkpoint(source, tmp_path)
    assert str(error.value) == f"{tmp_path} exists; choose another name or remove it"


def test_nan_weights_are_not_written(saved, tmp_path):
    folder = saved("llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        write_checkpoint(open_checkpoint(folder), tmp_path / "out")
    assert str(error.value) == (
        "tensor 'model.layers.1.mlp.down_proj.weight' holds NaN or infinite values; "
        "the checkpoint is damaged or its training diverged"
    )
    assert not (tmp_path / "out").exists()
