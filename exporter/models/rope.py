"""Rotary frequencies and their context scalings, as Hugging Face's `modeling_rope_utils` defines them.

`frequencies` gives θ_i in radians a token for the D_rot/2 rotating pairs and the factor on cos and sin (1 but for yarn).
Pairs are half-split: channel i turns with channel i + D_rot/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exporter.config import ModelConfig, RopeConfig


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """float32 [D_rot/2] and the attention factor."""
    rope, dim = config.rope, config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    base = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return base / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(base, rope), 1.0
    if rope.kind == "yarn":
        factor = rope.attention_factor
        return _yarn(base, rope, dim), 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor
    return base, 1.0


def _llama3(base: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: waves longer than the first context are slowed by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / base
    turns = rope.original_max_positions / wavelength
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * base + (1 - keep) * base / rope.factor


def _yarn(base: Tensor, rope: RopeConfig, dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071), equations 17-23: "NTK-by-parts" between `beta_fast` and `beta_slow` turns a context."""

    def channel(turns: float) -> float:
        return dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp has no width; keep it finite
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return base / rope.factor * ramp + base * (1 - ramp)
