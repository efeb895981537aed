"""The decoder of exporter/models as it is trained: whole windows, no cache, differentiable. Parameters keep their names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exporter.config import ModelConfig
from exporter.models.decoder import Attention, Epilogue, Prologue
from exporter.models.ffn import FeedForward
from exporter.models.norm import Norm


class TrainedDecoder(nn.Module):
    """ids [B,T] → logits [B·T,V] and the hidden states [B·T,d] after each layer.

    The operators of the exported graph (grouped attention, rotary embedding) have no gradient; here torch's own
    scaled_dot_product_attention, with G KV heads as they are, and the rotation written out take their place.
    """

    def __init__(self, config: ModelConfig, checkpointing: bool = False) -> None:
        super().__init__()
        self.prologue = Prologue(config, torch.float32)
        self.layers = nn.ModuleList(TrainedLayer(config, kv_heads, checkpointing) for kv_heads in config.kv_heads)
        self.epilogue = Epilogue(config, last_only=False)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        learned = self.prologue.embed_positions is not None  # angles serve all rows alike, embeddings are added to each
        x, cos, sin = self.prologue(ids_BT, positions.expand_as(ids_BT) if learned else positions)
        hidden = []
        for layer in self.layers:
            x = layer(x, ids_BT.shape[0], cos, sin)
            hidden.append(x)
        head = self.prologue.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(self.epilogue.norm(x), head), hidden


class TrainedLayer(nn.Module):
    """x [B·T,d] → [B·T,d]; cos, sin [1,T,D_rot/2]. With `checkpointing` only x is kept for the backward pass."""

    def __init__(self, config: ModelConfig, kv_heads: int, checkpointing: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(config, config.hidden_size)
        self.self_attn = Attention(config, kv_heads)
        self.post_attention_layernorm = Norm(config, config.hidden_size)
        self.mlp = FeedForward(config)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, batch: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing draws random numbers, so their state need not be kept.
            return checkpoint(self._forward, x, batch, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, batch, cos, sin)

    def _forward(self, x: Tensor, batch: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        x = x + attend(self.self_attn, self.input_layernorm(x), batch, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


def attend(weights: Attention, x: Tensor, batch: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Causal grouped-query attention of x [B·T,d] with the projections and norms of `weights`: [B·T,d]."""
    query, key, value = (
        projected.reshape(batch, -1, heads, projected.shape[-1] // heads)
        for projected, heads in (
            (weights.q_proj(x), weights.num_heads),
            (weights.k_proj(x), weights.kv_heads),
            (weights.values(x), weights.kv_heads),
        )
    )
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = weights.q_norm(query), weights.k_norm(key)
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    output_BHTD = F.scaled_dot_product_attention(
        query.to(value.dtype).transpose(1, 2),
        key.to(value.dtype).transpose(1, 2),
        value.transpose(1, 2),
        is_causal=True,
        scale=weights.scale,
        enable_gqa=weights.num_heads != weights.kv_heads,
    )
    return weights.o_proj(output_BHTD.transpose(1, 2).reshape(x.shape[0], -1))


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first D_rot channels turned in half-split pairs, the others as they are."""
    half = cos.shape[-1]
    first, second, rest = x_BTHD.split([half, half, x_BTHD.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest.to(cos.dtype)], dim=-1)
