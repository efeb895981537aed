"""GLU attention with fewer KV heads: each half pooled on its own, exact where it can be, and what folds through the gates."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoint import Checkpoint, expected_shapes
from exporter.config import ModelConfig, RopeConfig
from exporter.convert import convert_weights
from exporter.convert.attention import AttentionWeights
from exporter.convert.layer import check_finite, solvable
from exporter.convert.methods import held
from exporter.errors import CheckpointError, UserError
from exporter.models.decoder import Decoder

CONFIG = ModelConfig(67, 48, 2, 6, (6, 6), 16, 40, 128, glu_value_dim=10, rope=RopeConfig(theta=500.0), family="headpool")
TOKENS = np.random.default_rng(1).integers(0, 67, (6, 48))


def checkpoint(config: ModelConfig = CONFIG) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = held(name, noise * 0.3 + (1.0 if "norm" in name else 0.0))
    return Checkpoint("glu", config, weights, {}, (), {})


def with_heads(source: Checkpoint, kv_heads: Any, method: Any = "mean", **options: Any) -> Checkpoint:
    config, weights = convert_weights(source.config, source.weights, kv_heads, method, **options)
    return dataclasses.replace(source, config=config, weights=weights)


def logits(source: Checkpoint, tokens: np.ndarray = TOKENS) -> torch.Tensor:
    model = Decoder.from_weights(source.config, source.weights)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model(torch.from_numpy(tokens), positions, model.empty_cache(*tokens.shape))[0]


def divergence(source: Checkpoint, other: Checkpoint) -> float:
    ours, theirs = (logits(each).double().log_softmax(-1) for each in (source, other))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("bias", [False, True])
def test_each_half_is_pooled_on_its_own(bias: bool) -> None:
    source = checkpoint(dataclasses.replace(CONFIG, qkv_bias=bias))
    pooled = with_heads(source, 2)
    prefix = "model.layers.1.self_attn."
    kinds = ("weight", "bias") if bias else ("weight",)
    for name, size in (("k_proj", 16), ("v_proj", 10), ("v_gate_proj", 10)):
        for kind in kinds:
            before, after = (each.weights[f"{prefix}{name}.{kind}"].read() for each in (source, pooled))
            groups = before.reshape(2, 3, size, -1)
            torch.testing.assert_close(after.reshape(2, size, -1), groups.mean(1))
    one = with_heads(source, 2, "first").weights[f"{prefix}v_gate_proj.weight"].read()
    assert torch.equal(one.reshape(2, 10, -1), source.weights[f"{prefix}v_gate_proj.weight"].read().reshape(2, 3, 10, -1)[:, 0])
    drawn = with_heads(source, 2, "random", seed=4)
    for group in range(2):  # K, value and gate of the same head
        chosen = {
            next(
                head
                for head in range(3)
                if torch.equal(
                    drawn.weights[f"{prefix}{name}.weight"].read().reshape(2, size, -1)[group],
                    source.weights[f"{prefix}{name}.weight"].read().reshape(2, 3, size, -1)[group, head],
                )
            )
            for name, size in (("k_proj", 16), ("v_proj", 10), ("v_gate_proj", 10))
        }
        assert len(chosen) == 1


@pytest.mark.parametrize("method", ["mean", "mean-renorm", "procrustes", "optimal"])
def test_degrouping_is_exact(method: Any) -> None:
    source = checkpoint(CONFIG.with_kv_heads(2))
    torch.testing.assert_close(logits(with_heads(source, 6, method)), logits(source), rtol=0, atol=1e-4)


def related(config: ModelConfig = CONFIG) -> Checkpoint:
    """Heads of a group that differ by what folds: keys by turns, V' by the places, factors and signs of its channels."""
    source, rng = checkpoint(config), np.random.default_rng(3)
    weights = dict(source.weights)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        names = [prefix + name + ".weight" for name in ("k_proj", "v_proj", "v_gate_proj")]
        key, value, gate = (weights[name].read().reshape(2, 3, -1, 48) for name in names)
        for group in range(2):
            for head in range(1, 3):
                places = rng.permutation(config.value_dim)
                factors = torch.from_numpy(rng.choice([-1, 1], len(places)) * rng.uniform(0.5, 2, len(places))).float()
                key[group, head] = -key[group, 0]
                value[group, head] = value[group, 0][places] * factors[:, None]
                gate[group, head] = gate[group, 0][places]
        for name, heads in zip(names, (key, value, gate), strict=True):
            weights[name] = held(name, heads.reshape(-1, 48))
    return dataclasses.replace(source, weights=weights)


@pytest.mark.parametrize("method", ["procrustes", "optimal"])
def test_what_folds_is_folded_exactly(method: Any) -> None:
    source = related()
    assert divergence(source, with_heads(source, 2, method)) < 1e-6
    assert divergence(source, with_heads(source, 2, method, tokens=TOKENS)) < 1e-5
    assert divergence(source, with_heads(source, 2, "mean")) > 0.1


def test_gates_that_float32_cannot_hold_are_refused() -> None:
    heads = torch.ones(2, 4, 8, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"too small \(its values exceed float32\)"), solvable(3):
        check_finite(AttentionWeights(heads, heads, heads, heads, gate=1e39 * heads))


@pytest.mark.parametrize("bias", [False, True])
def test_least_squares_on_tokens_help(bias: bool) -> None:
    source = checkpoint(dataclasses.replace(CONFIG, qkv_bias=bias))
    mean, folded = (divergence(source, with_heads(source, 2, method)) for method in ("mean", "optimal"))
    corrected = divergence(source, with_heads(source, 2, "optimal", tokens=TOKENS, grouping="best"))
    assert corrected < 0.8 * min(mean, folded)


PLAIN = dataclasses.replace(CONFIG, glu_value_dim=None)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "norm": "layer"}, {"qk_norm": True}])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_open_gates_change_nothing(changes: dict[str, Any], kv_heads: int) -> None:
    source = checkpoint(dataclasses.replace(PLAIN, **changes))
    gated = with_heads(source, kv_heads, "mean", glu_value_dim=16)
    assert (gated.config.glu_value_dim, gated.config.qkv_bias) == (16, True)
    assert {name: tensor.shape for name, tensor in gated.weights.items()} == expected_shapes(gated.config)
    torch.testing.assert_close(logits(gated), logits(with_heads(source, kv_heads)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}])
def test_narrower_values_lose_least(changes: dict[str, Any], kv_heads: int) -> None:
    """Dv = 10 of 16 channels: with and without tokens, beside a value whose last channels are cut off."""
    source = checkpoint(dataclasses.replace(PLAIN, **changes))
    by_weights = with_heads(source, kv_heads, "optimal", glu_value_dim=10)
    on_tokens = with_heads(source, kv_heads, "optimal", glu_value_dim=10, tokens=TOKENS)
    shapes = expected_shapes(on_tokens.config)
    assert {name: tensor.shape for name, tensor in by_weights.weights.items()} == shapes
    assert {name: tensor.shape for name, tensor in on_tokens.weights.items()} == shapes
    cut = dict(source.weights)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        cut[name] = held(name, (cut[name].read().reshape(48, 6, 16) * (torch.arange(16) < 10)).reshape(48, -1))
    lost = [divergence(source, each) for each in (on_tokens, by_weights)]
    if kv_heads == 6:
        assert lost[0] < lost[1] < divergence(source, dataclasses.replace(source, weights=cut))
    else:
        assert lost[0] < lost[1]


def test_values_of_low_rank_lose_nothing() -> None:
    source, weights = checkpoint(PLAIN), dict(checkpoint(PLAIN).weights)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        left, _, right = torch.linalg.svd(weights[name].read().reshape(6, 16, 48), full_matrices=False)
        weights[name] = held(name, (left[..., :10] @ right[:, :10]).reshape(96, 48))
    source = dataclasses.replace(source, weights=weights)
    assert divergence(source, with_heads(source, 6, "optimal", glu_value_dim=10)) < 1e-6


@pytest.mark.parametrize(("value_dim", "config"), [(17, PLAIN), (0, PLAIN), (10, CONFIG)])
def test_gates_that_cannot_be(value_dim: int, config: ModelConfig) -> None:
    with pytest.raises(UserError, match="glu-values"):
        with_heads(checkpoint(config), 6, "optimal", glu_value_dim=value_dim)


def test_gradients_reach_the_gates() -> None:
    """From the first step on, though its weights are zero."""
    from exporter.uptrain.model import TrainedDecoder

    source = with_heads(checkpoint(PLAIN), 6, "mean", glu_value_dim=16)
    model = TrainedDecoder(source.config)
    state = Decoder.from_weights(source.config, source.weights).state_dict()
    model.load_state_dict(state, strict=False)
    scores, _ = model(torch.from_numpy(TOKENS[:2, :-1]))
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(TOKENS[:2, 1:]).reshape(-1)).backward()
    for layer in model.layers:
        gate = layer.self_attn.v_gate_proj
        assert gate.weight.grad.abs().max() > 1e-4
        assert gate.bias.grad.abs().max() > 1e-4
