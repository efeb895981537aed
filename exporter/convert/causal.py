"""Attention over windows of tokens as plain linear algebra, and the adjoints of its linear parts."""

from __future__ import annotations

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
        heads = (inputs @ weights.flatten(0, 1).T).unflatten(1, weights.shape[:2]).transpose(0, 1)
        return self._turn(heads if norm is None else F.rms_norm(heads, norm.shape, norm, self.eps), 1)

    def project_adjoint(self, projected: Tensor, inputs: Tensor, total: Tensor) -> None:
        """[heads,T,D] and [T,e], added to `total` [heads,D,e]."""
        total.view(-1, total.shape[2]).addmm_(self._turn(projected, -1).transpose(0, 1).flatten(1).T, inputs)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        groups = query.unflatten(0, (key.shape[0], -1)).flatten(1, 2)
        return (groups @ key.mT).unflatten(1, (-1, key.shape[1])).flatten(0, 1) * self.scale

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

    def attend(self, layer: AttentionWeights, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities, and the attention's output [T,d] without its bias."""
        probabilities = self.attention(layer, inputs)
        return probabilities, self.output(layer, probabilities, inputs)

    def attention(self, layer: AttentionWeights, inputs: Tensor) -> Tensor:
        """The probabilities alone, [H,T,T]."""
        norms = layer.norms or (None, None)
        query, key = self.project(layer.query, inputs, norms[0]), self.project(layer.key, inputs, norms[1])
        return self.probabilities(self.scores(query, key))

    def gated(self, layer: AttentionWeights, values: Tensor, inputs: Tensor) -> Tensor:
        """[G,T,Dv] times the gates of GLU attention, where there are any."""
        return values if layer.gate is None else values * F.silu(inputs @ layer.gate.mT)

    def mixed(self, layer: AttentionWeights, probabilities: Tensor, inputs: Tensor) -> Tensor:
        """What W_O reads, [T, H·Dv]."""
        values = self.gated(layer, inputs @ layer.value.mT, inputs)
        return self.mix(probabilities, values).transpose(0, 1).flatten(1)

    def output(self, layer: AttentionWeights, probabilities: Tensor, inputs: Tensor) -> Tensor:
        return self.mixed(layer, probabilities, inputs) @ layer.output.flatten(1).T

    def _turn(self, x: Tensor, sign: int) -> Tensor:
        """Rotary positions; with sign −1 their transpose."""
        if not self.half:
            return x
        one, other, rest = x[..., : self.half], x[..., self.half : 2 * self.half], x[..., 2 * self.half :]
        sin = self.sin * sign
        return torch.cat([one * self.cos - other * sin, other * self.cos + one * sin, rest], -1)
