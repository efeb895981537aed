"""The encoder-decoder of T5: its parts, each traced apart (exporter/trace_seq2seq.py), and the whole under eager torch.

Activations between attention layers are 2-D, [B·T, d]. The relative positions' biases are made once in each stack and shared by
its layers. What cross-attention reads is made from the encoder's output once, by `CrossCache`, and only read after.
E: tokens of the encoder's input; T, S: as in exporter/config.py, of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from exporter.models.decoder import Cache, Epilogue
from exporter.models.ffn import FeedForward
from exporter.models.grouped_attention import grouped_attention, read_attention
from exporter.models.norm import Norm
from exporter.models.relative import RelativeBias, bucket_table
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import Weights

SCALE = 1.0  # T5 does not scale QKᵀ: its initialisation does


class EncoderPrologue(nn.Module):
    """input_ids [B,E], embedding [V,d] → x [B·E,d] and the bias [1,H,E,E] of all layers."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.bias = RelativeBias(config, bidirectional=True)

    def forward(self, input_ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        bias_EEH = self.bias(places[None, :] - places[:, None])
        return embedding(input_ids.reshape(-1), weight), bias_EEH.permute(2, 0, 1).unsqueeze(0)


class EncoderAttention(nn.Module):
    """Every token sees every token that `mask` [B,E] keeps. x is [B·E,d]."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        d, self.num_heads, self.head_dim = config.hidden_size, config.num_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        B, E = mask.shape
        H = self.num_heads
        query = self.q_proj(x).reshape(B, E, -1)
        key, value = (heads(linear_(x).reshape(B, E, -1), H, self.head_dim) for linear_ in (self.k_proj, self.v_proj))
        output = read_attention(query, key, value, mask, bias, H, H, SCALE)
        return self.o_proj(output.reshape(-1, self.o_proj.in_features))


class EncoderLayer(nn.Module):
    """x + Attention(norm(x)), then x + FFN(norm(x))."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(config, config.hidden_size)
        self.self_attn = EncoderAttention(config)
        self.post_attention_layernorm = Norm(config, config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class EncoderEpilogue(nn.Module):
    """x [B·E,d] → hidden states [B,E,d]."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.norm = Norm(config, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, E = mask.shape
        return self.norm(x).reshape(B, E, -1)


class CrossCache(nn.Module):
    """The encoder's hidden states [B,E,d] → what one layer's cross-attention reads: K [B,G,E,D] and V [B,G,E,Dv]."""

    def __init__(self, config: Seq2SeqConfig, kv_heads: int) -> None:
        super().__init__()
        d, self.kv_heads, self.sizes = config.hidden_size, kv_heads, (config.head_dim, config.value_dim)
        self.k_proj, self.v_proj = (nn.Linear(d, kv_heads * size, bias=False) for size in self.sizes)

    def forward(self, hidden: Tensor) -> Cache:
        B, E, d = hidden.shape
        flat = hidden.reshape(-1, d)
        key, value = (
            heads(projection(flat).reshape(B, E, -1), self.kv_heads, size)
            for projection, size in zip((self.k_proj, self.v_proj), self.sizes, strict=True)
        )
        return key, value


class DecoderPrologue(nn.Module):
    """input_ids [B,T], embedding [V,d] → x [B·T,d] and the bias of all layers.

    Static form: position_ids [B,T], bias [B,H,T,S]. Concat form: position_ids None, bias [1,H,T,P+T] and the mask [B,P+T] of
    ones that grouped_attention asks for. `past_key` is the first layer's, for its length only.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.bias = RelativeBias(config, bidirectional=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, past_key: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x = embedding(input_ids.reshape(-1), weight)
        B, T = input_ids.shape
        length, device = past_key.shape[2], input_ids.device
        if position_ids is not None:
            rows = torch.arange(length, device=device)
            return x, self.bias(rows - position_ids.unsqueeze(2)).permute(0, 3, 1, 2)
        rows = torch.arange(length + T, device=device)
        bias_TSH = self.bias(rows[None, :] - rows[length:, None])
        return x, bias_TSH.permute(2, 0, 1).unsqueeze(0), torch.ones(B, length + T, dtype=torch.int64, device=device)


class SelfAttention(nn.Module):
    """The decoder's, over its cache; `position_ids` in the static form, `attention_mask` in the concat form."""

    def __init__(self, config: Seq2SeqConfig, kv_heads: int) -> None:
        super().__init__()
        d, self.num_heads, self.kv_heads = config.hidden_size, config.num_heads, kv_heads
        self.q_proj = nn.Linear(d, self.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * config.value_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.value_dim, d, bias=False)

    def forward(
        self, x: Tensor, tokens: Tensor, position_ids: Tensor | None, mask: Tensor | None, bias: Tensor, past: Cache
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T = tokens.shape
        query, key, value = (projection(x).reshape(B, T, -1) for projection in (self.q_proj, self.k_proj, self.v_proj))
        output, *present = grouped_attention(
            query, key, value, *past, position_ids, mask, self.num_heads, self.kv_heads, SCALE, bias
        )
        return self.o_proj(output.reshape(-1, self.o_proj.in_features)), present[0], present[1]


class CrossAttention(nn.Module):
    """The decoder's tokens read what `CrossCache` made; `mask` [B,E] hides the encoder's padding."""

    def __init__(self, config: Seq2SeqConfig, kv_heads: int) -> None:
        super().__init__()
        d, self.num_heads, self.kv_heads = config.hidden_size, config.num_heads, kv_heads
        self.q_proj = nn.Linear(d, self.num_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.value_dim, d, bias=False)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, cross: Cache) -> Tensor:
        B, T = tokens.shape
        query = self.q_proj(x).reshape(B, T, -1)
        output = read_attention(query, *cross, mask, None, self.num_heads, self.kv_heads, SCALE)
        return self.o_proj(output.reshape(-1, self.o_proj.in_features))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and FFN, each x + f(norm(x)). `tokens` [B,T] gives the shape."""

    def __init__(self, config: Seq2SeqConfig, kv_heads: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config, config.hidden_size)
        self.self_attn = SelfAttention(config, kv_heads)
        self.cross_layernorm = Norm(config, config.hidden_size)
        self.cross_attn = CrossAttention(config, kv_heads)
        self.post_attention_layernorm = Norm(config, config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        position_ids: Tensor | None,
        mask: Tensor | None,
        bias: Tensor,
        encoder_mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        cross_key: Tensor,
        cross_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        past = (past_key, past_value)
        attended, *present = self.self_attn(self.input_layernorm(x), tokens, position_ids, mask, bias, past)
        x = x + attended
        x = x + self.cross_attn(self.cross_layernorm(x), tokens, encoder_mask, (cross_key, cross_value))
        return x + self.mlp(self.post_attention_layernorm(x)), *present


def heads(x_BTE: Tensor, count: int, size: int) -> Tensor:
    """[B,T,count·size] → [B,count,T,size]."""
    return x_BTE.reshape(x_BTE.shape[0], x_BTE.shape[1], count, size).transpose(1, 2)


class Encoder(nn.Module):
    """input_ids, mask [B,E] → hidden states [B,E,d]."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.prologue = EncoderPrologue(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.epilogue = EncoderEpilogue(config)

    def forward(self, input_ids: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        x, bias = self.prologue(input_ids, weight)
        for layer in self.layers:
            x = layer(x, mask, bias)
        return self.epilogue(x, mask)


class Decoder(nn.Module):
    """The decoder's parts; `caches` make what cross-attention reads."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.caches = nn.ModuleList(CrossCache(config, kv_heads) for kv_heads in config.kv_heads)
        self.prologue = DecoderPrologue(config)
        self.layers = nn.ModuleList(DecoderLayer(config, kv_heads) for kv_heads in config.kv_heads)
        self.epilogue = Epilogue(config, last_only=False, scale=config.head_scale)


class Seq2Seq(nn.Module):
    """The whole model under eager torch. `canonical_to_module` gives the state-dict key of a canonical parameter name."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids, mask [B,E] → hidden states [B,E,d]."""
        return self.encoder(input_ids, mask, self.shared.weight)

    def cross_caches(self, hidden: Tensor) -> list[Cache]:
        """Hidden states [B,E,d] → what each decoder layer's cross-attention reads."""
        return [cache(hidden) for cache in self.decoder.caches]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        past: Sequence[Cache],
        cross: Sequence[Cache],
        encoder_mask: Tensor,
    ) -> tuple[Tensor, list[Cache]]:
        """The decoder: input_ids [B,T] → logits and the caches after. Static form with position_ids [B,T], else concat."""
        x, bias, *mask = self.decoder.prologue(input_ids, position_ids, past[0][0], self.shared.weight)
        present: list[Cache] = []
        for layer, kept, read in zip(self.decoder.layers, past, cross, strict=True):
            x, key, value = layer(x, input_ids, position_ids, mask[0] if mask else None, bias, encoder_mask, *kept, *read)
            present.append((key, value))
        head = self.shared.weight if self.lm_head is None else self.lm_head.weight
        return self.decoder.epilogue(x, input_ids, head), present

    def empty_cache(self, batch: int, length: int) -> list[Cache]:
        """Zeroed self-attention caches: `length` is the capacity (static) or 0 (concat)."""
        zeros, sizes = self.shared.weight.new_zeros, (self.config.head_dim, self.config.value_dim)
        return [(zeros(batch, g, length, sizes[0]), zeros(batch, g, length, sizes[1])) for g in self.config.kv_heads]

    @classmethod
    def from_weights(cls, config: Seq2SeqConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> Seq2Seq:
        """A model in eval mode with `weights` (canonical names) read and cast to `dtype`."""
        with torch.device("meta"):
            model = cls(config)
        state = {canonical_to_module(name): tensor.read().to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(state, assign=True)
        for bias, bidirectional in ((model.encoder.prologue.bias, True), (model.decoder.prologue.bias, False)):
            bias.buckets = bucket_table(config.relative_buckets, config.relative_max_distance, bidirectional)
        return model.eval().requires_grad_(False)


def canonical_to_module(name: str) -> str:
    """Canonical parameter name → key in Seq2Seq's state dict."""
    stack, _, rest = name.partition(".")
    if rest == "bias.weight":
        return f"{stack}.prologue.{rest}"
    if rest == "norm.weight":
        return f"{stack}.epilogue.{rest}"
    if rest.endswith(("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")):
        return f"{stack}.{rest.replace('layers.', 'caches.').replace('cross_attn.', '')}"
    return name
