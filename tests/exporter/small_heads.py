"""Attention of a few heads in float64, and numbers to fill it with."""

from __future__ import annotations

import pytest
import torch

from exporter.config import ModelConfig, RopeConfig
from exporter.convert.attention import AttentionWeights

D, WIDTH, T = 16, 40, 24
ROTARY = pytest.mark.parametrize("rotary_dim", [D, D // 2, 0])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(rotary_dim: int, heads: int, kv_heads: int) -> ModelConfig:
    rope = RopeConfig(fraction=rotary_dim / D, theta=50.0) if rotary_dim else RopeConfig(kind="none")
    return ModelConfig(32, WIDTH, 1, heads, (kv_heads,), D, 32, 64, rope=rope)


def layer(heads: int, kv_heads: int) -> AttentionWeights:
    key, value = normal(kv_heads, D, WIDTH, seed=1), normal(kv_heads, D, WIDTH, seed=2)
    return AttentionWeights(normal(heads, D, WIDTH, seed=3), key, value, normal(WIDTH, heads, D, seed=4))
