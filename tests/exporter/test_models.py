"""The parts of the decoder against their papers' formulas, written out in numpy and float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoint import expected_shapes
from exporter.config import FFN_KINDS, GATED_FFN_KINDS, ModelConfig, RopeConfig, two_thirds
from exporter.models.decoder import Decoder, Rotary, canonical_to_module
from exporter.models.ffn import FeedForward
from exporter.models.grouped_attention import grouped_attention
from exporter.models.norm import Norm
from exporter.models.rope import frequencies

CONFIG = ModelConfig(67, 12, 2, 6, (2, 3), 8, 20, 128)
erf = np.vectorize(math.erf)


def randomise(module: torch.nn.Module, std: float = 0.8) -> Any:
    generator = torch.Generator().manual_seed(0)
    module.double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return module


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# "GLU Variants Improve Transformer" (arXiv 2002.05202), in the paper's letters: FFN(x, W1, W2) without and
# GLU(x, W, V) ⊗ with a gate; Swish with β = 1; GELU by the error function.
def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swish(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


PAPER = {
    "relu": lambda x, W1, W2: relu(x @ W1) @ W2,
    "gelu": lambda x, W1, W2: gelu(x @ W1) @ W2,
    "swish": lambda x, W1, W2: swish(x @ W1) @ W2,
    "glu": lambda x, W, V, W2: (sigmoid(x @ W) * (x @ V)) @ W2,
    "bilinear": lambda x, W, V, W2: ((x @ W) * (x @ V)) @ W2,
    "reglu": lambda x, W, V, W2: (relu(x @ W) * (x @ V)) @ W2,
    "geglu": lambda x, W, V, W2: (gelu(x @ W) * (x @ V)) @ W2,
    "swiglu": lambda x, W, V, W2: (swish(x @ W) * (x @ V)) @ W2,
}


@pytest.mark.parametrize("kind", FFN_KINDS)
def test_feed_forward(kind: str) -> None:
    ffn = randomise(FeedForward(dataclasses.replace(CONFIG, ffn=kind)))
    x = np.random.default_rng(1).normal(0, 2, (5, 12))
    names = ("gate_proj", "up_proj", "down_proj") if kind in GATED_FFN_KINDS else ("up_proj", "down_proj")
    weights = [getattr(ffn, name).weight.numpy().T for name in names]
    np.testing.assert_allclose(ffn(torch.from_numpy(x)).numpy(), PAPER[kind](x, *weights), rtol=1e-12, atol=1e-12)


def test_the_tanh_approximation_of_gelu() -> None:
    ffn = randomise(FeedForward(dataclasses.replace(CONFIG, ffn="geglu", gelu_tanh=True)))
    x = np.random.default_rng(1).normal(0, 2, (5, 12))
    gate, up, down = (getattr(ffn, f"{name}_proj").weight.numpy().T for name in ("gate", "up", "down"))
    np.testing.assert_allclose(ffn(torch.from_numpy(x)).numpy(), (gelu_tanh(x @ gate) * (x @ up)) @ down, rtol=1e-12)


def test_feed_forward_biases() -> None:
    ffn = randomise(FeedForward(dataclasses.replace(CONFIG, ffn="swiglu", ffn_bias=True)))
    x = np.random.default_rng(1).normal(0, 2, (5, 12))
    weights = [(layer.weight.numpy().T, layer.bias.numpy()) for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)]
    gate, up, down = (lambda x, W=W, b=b: x @ W + b for W, b in weights)
    np.testing.assert_allclose(ffn(torch.from_numpy(x)).numpy(), down(swish(gate(x)) * up(x)), rtol=1e-12)


def test_a_gated_ffn_of_two_thirds_has_the_parameters_of_an_ungated_one() -> None:
    def count(kind: str, d_ff: int) -> int:
        config = dataclasses.replace(CONFIG, hidden_size=768, ffn=kind, intermediate_size=d_ff)
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in FeedForward(config).parameters())

    assert count("relu", 3072) == count("geglu", two_thirds(3072)) == 2 * 768 * 3072


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: str, offset: bool) -> None:
    norm = randomise(Norm(dataclasses.replace(CONFIG, norm=kind, norm_offset=offset, norm_eps=0.1), 12))
    x = np.random.default_rng(2).normal(1, 2, (5, 12))
    weight = norm.weight.numpy() + offset
    if kind == "rms":
        expected = x / np.sqrt((x**2).mean(1, keepdims=True) + 0.1) * weight
    else:
        expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.1) * weight + norm.bias.numpy()
    np.testing.assert_allclose(norm(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)


ROPES = {
    "default": RopeConfig(theta=500.0),
    "partial": RopeConfig(theta=500.0, fraction=0.5),
    "linear": RopeConfig("linear", 500.0, factor=3.0),
    "llama3": RopeConfig("llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64),
    "yarn": RopeConfig("yarn", 500.0, factor=4.0, original_max_positions=64),
    "yarn-own": RopeConfig(
        "yarn", 500.0, factor=4.0, original_max_positions=64, beta_fast=16.0, truncate=False, attention_factor=0.7
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies(name: str) -> None:
    rope = ROPES[name]
    config = dataclasses.replace(CONFIG, head_dim=32, rope=rope)
    dim = 16 if name == "partial" else 32
    theta = np.array([500.0 ** (-2 * i / dim) for i in range(dim // 2)])
    factor = 1.0
    if name == "linear":
        theta = theta / 3
    elif name == "llama3":  # long waves slowed by 8, short ones kept, a ramp in the number of turns between
        turns = 64 * theta / (2 * math.pi)
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        theta = (1 - smooth) * theta / 8 + smooth * theta
    elif name.startswith("yarn"):  # arXiv 2309.00071, equations 17-23
        fast = 16 if name == "yarn-own" else 32
        ends = [dim * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(500)) for turns in (fast, 1)]
        if rope.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        theta = theta / 4 * ramp + theta * (1 - ramp)
        factor = 0.7 if name == "yarn-own" else 0.1 * math.log(4) + 1
    values, attention_factor = frequencies(config)
    np.testing.assert_allclose(values.numpy(), theta, rtol=1e-5)
    assert attention_factor == pytest.approx(factor)
    cos, sin = Rotary(config, torch.float32)(torch.tensor([[0, 100]]))
    np.testing.assert_allclose(cos[0, 1], np.cos(100 * theta) * factor, atol=1e-4)
    np.testing.assert_allclose(sin[0, 1], np.sin(100 * theta) * factor, atol=1e-4)


def test_grouped_attention_one_head_at_a_time() -> None:
    """Query head h reads KV head h // R; row b's query t sees the cache rows up to its own position."""
    random = np.random.default_rng(3)
    B, T, H, G, D, Dv, S = 2, 3, 6, 2, 8, 4, 11
    query, key, value = (random.normal(size=(B, T, size)) for size in (H * D, G * D, G * Dv))
    past_key, past_value = random.normal(size=(B, G, S, D)), random.normal(size=(B, G, S, Dv))
    positions = np.array([[4, 5, 6], [0, 1, 2]])
    output, present_key, present_value = grouped_attention(
        *(torch.from_numpy(x).float() for x in (query, key, value, past_key, past_value)),
        torch.from_numpy(positions),
        None,
        H,
        G,
        0.3,
    )
    for b in range(B):
        for t in range(T):
            past_key[b, :, positions[b, t]] = key[b, t].reshape(G, D)
            past_value[b, :, positions[b, t]] = value[b, t].reshape(G, Dv)
    np.testing.assert_allclose(present_key, past_key, rtol=1e-6)
    np.testing.assert_allclose(present_value, past_value, rtol=1e-6)
    for b, t, h in np.ndindex(B, T, H):
        seen = positions[b, t] + 1
        scores = past_key[b, h // 3, :seen] @ query[b, t, h * D : (h + 1) * D] * 0.3
        weights = np.exp(scores - scores.max())
        expected = weights / weights.sum() @ past_value[b, h // 3, :seen]
        np.testing.assert_allclose(output[b, t, h * Dv : (h + 1) * Dv], expected, atol=1e-5)


VARIATIONS = [
    {},
    {"tied": False, "qkv_bias": True, "o_bias": True, "ffn_bias": True, "qk_norm": True},
    {"norm": "layer", "ffn": "gelu", "tied": False},
    {"rope": RopeConfig("none")},
]


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
def test_the_decoder_has_the_parameters_that_a_checkpoint_is_held_to(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    model = Decoder(config)
    shapes = {canonical_to_module(name): shape for name, shape in expected_shapes(config).items()}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes


def test_without_rope_the_order_of_the_past_does_not_matter() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1, kv_heads=(2,), rope=RopeConfig("none"))
    model = randomise(Decoder(config), 0.5).float()
    turned, _ = model(torch.tensor([[5, 9, 3, 7]]), torch.arange(4)[None], model.empty_cache(1, 4))
    straight, _ = model(torch.tensor([[3, 5, 9, 7]]), torch.arange(4)[None], model.empty_cache(1, 4))
    torch.testing.assert_close(turned[:, -1], straight[:, -1])
    rotated = randomise(Decoder(dataclasses.replace(config, rope=RopeConfig(theta=10.0))), 0.5).float()
    one, _ = rotated(torch.tensor([[5, 9, 3, 7]]), torch.arange(4)[None], rotated.empty_cache(1, 4))
    other, _ = rotated(torch.tensor([[3, 5, 9, 7]]), torch.arange(4)[None], rotated.empty_cache(1, 4))
    assert (one[:, -1] - other[:, -1]).abs().max() > 0.01
