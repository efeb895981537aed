"""Attention over windows of tokens as plain linear algebra, and the adjoints of its linear parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.fold import rotating
from exporter.models.decoder import Rotary


class CausalAttention:
    """Attention over windows of T tokens from position 0, and the adjoints of its linear parts.

    Inputs are [T,e] of one window, weights [heads,D,e], rotated projections [heads,T,D], scores and probabilities [H,T,T].
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        self.half, self.scale, self.eps = rotating(config) // 2, config.head_dim**-0.5, config.norm_eps
        if self.half:
            cos, sin = Rotary(config, torch.float32)(torch.arange(length)[None])
            self.cos, self.sin = cos[0], sin[0]
        self.hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

    def project(self, weights: Tensor, inputs: Tensor, norm: Tensor | None = None) -> Tensor:
        read = (inputs @ weights.flatten(0, 1).T).unflatten(1, weights.shape[:2])
        return self.turned(read if norm is None else F.rms_norm(read, norm.shape, norm, self.eps))

    def turned(self, read: Tensor) -> Tensor:
        """X·Wᵀ [T,heads,D] → [heads,T,D] with rotary positions."""
        return self._turn(read.transpose(0, 1), 1)

    def turned_back(self, turned: Tensor) -> Tensor:
        """The adjoint: [heads,T,D] → [T,heads,D]."""
        return self._turn(turned, -1).transpose(0, 1)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        groups = query.unflatten(0, (key.shape[0], -1)).flatten(1, 2)
        return (groups * self.scale @ key.mT).unflatten(1, (-1, key.shape[1])).flatten(0, 1)

    def scores_adjoint_query(self, scores: Tensor, key: Tensor) -> Tensor:
        return self.mix(scores, key) * self.scale

    def scores_adjoint_key(self, scores: Tensor, query: Tensor, kv_heads: int) -> Tensor:
        return self.mix_adjoint(scores, query, kv_heads) * self.scale

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.masked_fill_(self.hidden, -torch.inf).softmax(-1)

    def mix(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """[H,T,T] and [G,T,Dv] → [H,T,Dv]."""
        G, T = value.shape[:2]
        return (probabilities.unflatten(0, (G, -1)).flatten(1, 2) @ value).unflatten(1, (-1, T)).flatten(0, 1)

    def mix_adjoint(self, probabilities: Tensor, mixed: Tensor, kv_heads: int) -> Tensor:
        """[H,T,T] and [H,T,Dv] → [G,T,Dv]."""
        return probabilities.unflatten(0, (kv_heads, -1)).flatten(1, 2).mT @ mixed.unflatten(0, (kv_heads, -1)).flatten(1, 2)

    def attend(self, layer: AttentionWeights, inputs: Tensor) -> Tensor:
        """The attention's output [n,T,d], without its bias, on n windows [n,T,e]."""
        return self.outputs(layer, (self.attention(layer, window) for window in inputs), inputs)

    def outputs(self, layer: AttentionWeights, probabilities: Iterable[Tensor], inputs: Tensor) -> Tensor:
        """The same, given the probabilities of each window."""
        output = layer.output.flatten(1).T
        return torch.stack([self.mixed(layer, *pair) @ output for pair in zip(probabilities, inputs, strict=True)])

    def attention(self, layer: AttentionWeights, inputs: Tensor) -> Tensor:
        """The probabilities alone, [H,T,T]."""
        return self.probabilities(self.scores(*self.scored(layer, inputs)))

    def scored(self, layer: AttentionWeights, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys, rotated, of which scores are made."""
        norms = layer.norms or (None, None)
        return self.project(layer.query, inputs, norms[0]), self.project(layer.key, inputs, norms[1])

    def gated(self, layer: AttentionWeights, values: Tensor, inputs: Tensor) -> Tensor:
        """[G,T,Dv] times the gates of GLU attention, where there are any."""
        return values if layer.gate is None else values * F.silu(inputs @ layer.gate.mT)

    def mixed(self, layer: AttentionWeights, probabilities: Tensor, inputs: Tensor) -> Tensor:
        """What W_O reads, [T, H·Dv]."""
        values = self.gated(layer, inputs @ layer.value.mT, inputs)
        return self.mix(probabilities, values).transpose(0, 1).flatten(1)

    def _turn(self, x: Tensor, sign: int) -> Tensor:
        """Rotary positions; with sign −1 their transpose."""
        if not self.half:
            return x
        one, other, rest = x[..., : self.half], x[..., self.half : 2 * self.half], x[..., 2 * self.half :]
        sin = self.sin * sign
        return torch.cat([one * self.cos - other * sin, other * self.cos + one * sin, rest], -1)
