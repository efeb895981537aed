"""GLU attention against transformers' Llama with the paper's formula put into its value projection; caches; configs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import hf
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from exporter import contract
from exporter.bundle import Bundle
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source, write_checkpoint
from exporter.config import ModelConfig, RopeConfig
from exporter.engines import open_session
from exporter.engines.torch_eager import open_torch
from exporter.errors import CheckpointError, UserError
from exporter.export import ExportOptions, export
from exporter.inspection import describe, inspect, render
from exporter.weights import ComputedTensor
from graphs.patterns import PATTERNS

D, DV = 16, 8
CONFIG = dataclasses.replace(tiny.CONFIG, kv_heads=(2, 2), glu_value_dim=DV, family="headpool", tied=True)
LEARNED = dataclasses.replace(CONFIG, rope=RopeConfig(kind="none"), learned_positions=True, norm="layer", ffn="relu")
TOLERANCE = 2e-4  # absolute, on logits of about ±10
FORMS = [(pattern, cache) for pattern in PATTERNS for cache in ("static", "concat") if (pattern, cache) != ("fused", "concat")]


class GatedValues(nn.Module):
    """x → x₁ · SiLU(x₂), x₁, x₂ = split(W_V x), then heads; zeros after each, since transformers wants heads as wide as K's."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.chunk(x @ self.matrix.T, 2, dim=-1)
        gated = one * other * torch.sigmoid(other)
        return nn.functional.pad(gated.unflatten(-1, (-1, DV)), (0, D - DV)).flatten(-2)


class NarrowOutput(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, D))[..., :DV].flatten(-2) @ self.matrix.T


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Written to a folder and read from it."""
    return made(CONFIG, tmp_path_factory.mktemp("glu"))


def made(config: ModelConfig, folder: Path) -> Checkpoint:
    """Large random weights in a folder."""
    (folder / "config.json").write_text(json.dumps({"model_type": "headpool", **without_family(config)}))
    source = open_source(folder / "config.json")
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in source.weights.items():
        value = torch.randn(tensor.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        weights[name] = ComputedTensor(name, value.dtype, tensor.shape, lambda value=value: value)
    write_checkpoint(dataclasses.replace(source, weights=weights), folder / "model")
    return open_checkpoint(folder / "model")


def without_family(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_json().items() if key != "family"}


def test_a_checkpoint_holds_the_papers_one_matrix(checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file

    file = load_file(checkpoint.files[0])
    prefix = "model.layers.1.self_attn."
    halves = [checkpoint.weights[prefix + name].read() for name in ("v_proj.weight", "v_gate_proj.weight")]
    assert torch.equal(file[prefix + "v_proj.weight"], torch.cat(halves))
    assert not any("v_gate_proj" in name for name in file)
    assert checkpoint.config == CONFIG


def gated_llama(checkpoint: Checkpoint) -> Any:
    """transformers' Llama with the weights of `checkpoint` and the paper's values."""
    config = checkpoint.config
    theirs = hf.build(
        "llama",
        {
            "vocab_size": config.vocab_size,
            "head_dim": D,
            "rope_theta": config.rope.theta,
            "tie_word_embeddings": True,
            "rms_norm_eps": config.norm_eps,
        },
    )
    weights = {name: tensor.read() for name, tensor in checkpoint.weights.items()}
    plain = {name: value for name, value in weights.items() if not any(part in name for part in ("v_proj", "v_gate", "o_proj"))}
    left = theirs.load_state_dict({**theirs.state_dict(), **plain, "lm_head.weight": plain["model.embed_tokens.weight"]})
    assert not left.missing_keys
    for index, layer in enumerate(theirs.model.layers):
        prefix = f"model.layers.{index}.self_attn."
        layer.self_attn.v_proj = GatedValues(torch.cat([weights[prefix + f"v{part}_proj.weight"] for part in ("", "_gate")]))
        layer.self_attn.o_proj = NarrowOutput(weights[prefix + "o_proj.weight"])
    return theirs


def test_logits_are_those_of_transformers_with_gated_values(checkpoint: Checkpoint) -> None:
    theirs = gated_llama(checkpoint)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40)
    expected = hf.logits(theirs, tokens)
    assert np.abs(expected).max() > 3
    with open_torch(checkpoint) as session:
        found = np.concatenate([session.prefill([tokens[:30]]), *(session.decode(tokens[i : i + 1]) for i in range(30, 40))])
    np.testing.assert_allclose(found, expected[29:], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def bundles(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        (pattern, cache): export(checkpoint, folder / f"{pattern}.{cache}", ExportOptions(patterns=(pattern,), cache=cache))
        for pattern, cache in FORMS
    }


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_sessions(form: tuple[str, str], bundles: dict[tuple[str, str], Bundle], checkpoint: Checkpoint) -> None:
    """Caches in place: prefill in chunks, decode, growth, a batch of unequal lengths. And they are as small as they can be."""
    bundle = bundles[form]
    (variant,) = bundle.variants
    for binding in [*variant.inputs(), *variant.outputs()]:
        if binding.role == "cache":
            assert binding.shape[3] == (D if binding.name.endswith("key") else DV)
    plain = dataclasses.replace(CONFIG, glu_value_dim=None)
    assert variant.kv_bytes_per_token * 2 * D == plain.kv_bytes_per_token("fp32") * (D + DV)
    rng = np.random.default_rng(1)
    for counts in ((40,), (5, 37, 1)):
        options = {"batch": len(counts), "capacity": 120}
        with open_session(bundle, variant, chunk=16, **options) as ours, open_torch(checkpoint, **options) as theirs:
            prompts = [rng.integers(0, CONFIG.vocab_size, count) for count in counts]
            np.testing.assert_allclose(ours.prefill(prompts), theirs.prefill(prompts), rtol=0, atol=TOLERANCE)
            for _ in range(30 if len(counts) == 1 else 3):  # past row 64, where static caches grow
                tokens = rng.integers(0, CONFIG.vocab_size, len(counts))
                np.testing.assert_allclose(ours.decode(tokens), theirs.decode(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", [("grouped", "static"), ("gqa", "concat"), ("fused", "static")], ids="-".join)
def test_learned_positions(form: tuple[str, str], tmp_path: Path) -> None:
    """With LayerNorm and an ungated FFN, which no family of transformers has in these names: all of it from config.json."""
    checkpoint = made(LEARNED, tmp_path)
    assert checkpoint.config == LEARNED
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(patterns=form[:1], cache=form[1]))  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    with (
        open_session(bundle, bundle.variants[0], batch=2, capacity=60) as ours,
        open_torch(checkpoint, batch=2, capacity=60) as theirs,
    ):
        prompts = [rng.integers(0, LEARNED.vocab_size, count) for count in (20, 7)]
        first = ours.prefill(prompts)
        np.testing.assert_allclose(first, theirs.prefill(prompts), rtol=0, atol=TOLERANCE)
        tokens = rng.integers(0, LEARNED.vocab_size, 2)
        np.testing.assert_allclose(ours.decode(tokens), theirs.decode(tokens), rtol=0, atol=TOLERANCE)
    positions = checkpoint.weights["model.embed_positions.weight"].read()
    moved = {**checkpoint.weights}
    name = "model.embed_positions.weight"
    moved[name] = ComputedTensor(name, torch.float32, tuple(positions.shape), lambda: positions.roll(1, 0))
    with open_torch(dataclasses.replace(checkpoint, weights=moved), batch=2, capacity=60) as other:
        assert np.abs(other.prefill(prompts) - first).max() > 1  # they matter


def test_inspect_says_it(checkpoint: Checkpoint) -> None:
    lines = render(inspect(checkpoint.files[0].parent))
    assert "  headpool: 2 layers, d 48, 6 query heads of 16, GLU attention with values of 8" in lines
    assert "  learned positions" in render({"kind": "config", "path": "x", "dtypes": [], "model": describe(LEARNED)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"glu_value_dim": 0}, "config glu_value_dim 0 is not a whole number from 1 to 2147483647, or null"),
        (
            {"learned_positions": True},
            "config has learned_positions and rope kind default; choose rope kind none, or no learned ones",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, **changes)
    assert str(error.value) == message


def test_a_config_of_our_own_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "headpool", **without_family(CONFIG), "glu_values": True}))
    with pytest.raises(CheckpointError, match=r"config\.json: config\.glu_values is an unknown key$"):
        open_source(path)


def test_no_other_family_can_say_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(checkpoint.config, family="llama")
    source = json.loads((hf.save("llama", tmp_path) / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"a llama config.json cannot say this model's .*glu_value_dim"):
        write_checkpoint(dataclasses.replace(checkpoint, config=config, hf_config=source), tmp_path / "out")


def test_contract_of_gated_values() -> None:
    shapes = {binding.name: binding.shape for binding in contract.inputs(CONFIG, "static", "fp32")}
    assert shapes["past_key_values.0.key"] == ("batch", 2, "capacity", D)
    assert shapes["past_key_values.0.value"] == ("batch", 2, "capacity", DV)
