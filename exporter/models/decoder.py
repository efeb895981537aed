"""The decoder-only transformer: embedding and rotary angles, N equal-shaped layers, final norm and output head.

Activations between attention layers are 2-D, [B·T, d], so that every weight matrix becomes one Gemm of the exported graph.
Parameter names are Hugging Face Llama's. The three parts (Prologue, Layer, Epilogue) are traced apart, see exporter/trace.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exporter.config import ModelConfig
from exporter.models.cache_rows import STORED
from exporter.models.ffn import FeedForward
from exporter.models.grouped_attention import grouped_attention
from exporter.models.norm import Norm
from exporter.models.rope import frequencies
from exporter.weights import Weights
from graphs.caches import row_width

Cache = tuple[Tensor, Tensor]  # K [B,G,S,D], V [B,G,S,Dv]


class Rotary(nn.Module):
    """position_ids [B,T] → cos, sin [B,T,D_rot/2] in `dtype`. The angles are computed in float32."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        values, self.attention_factor = frequencies(config)
        self.dtype = dtype
        self.register_buffer("inv_freq", values, persistent=False)

    def forward(self, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids_BT.to(torch.float32).unsqueeze(2) * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(self.dtype), sin.to(self.dtype)


class Prologue(nn.Module):
    """input_ids [B,T] → x [B·T, d], learned positions added; position_ids → cos, sin (none without RoPE)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        positions = (config.max_positions, config.hidden_size)
        self.embed_positions = nn.Embedding(*positions, dtype=dtype) if config.learned_positions else None
        self.rotary = Rotary(config, dtype) if config.rope.kind != "none" else None
        # In the weights' dtype, as Gemma has it: sqrt(3072) is 55.43, in bf16 55.5. On the CPU also where parameters are fake.
        self.embed_scale = torch.tensor(config.embed_scale, dtype=dtype, device="cpu").item()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.embed_tokens(input_ids.reshape(-1))
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids.reshape(-1))
        cos, sin = self.rotary(position_ids) if self.rotary is not None else (None, None)
        return x, cos, sin


class Attention(nn.Module):
    """Q, K, V and O of one layer around the grouped-attention operator.

    With gated values ("GLU Attention Improve Transformer", Wang 2025, arXiv 2507.00022) V' = x W_V ⊙ SiLU(x W_gate), split
    before heads are: the rows of the paper's one W_V are all value heads, then all gate heads.
    """

    def __init__(self, config: ModelConfig, kv_heads: int) -> None:
        super().__init__()
        d, H, G, D, Dv = config.hidden_size, config.num_heads, kv_heads, config.head_dim, config.value_dim
        self.num_heads, self.kv_heads, self.scale, self.rotary_dim = H, G, D**-0.5, config.rotary_dim
        self.q_proj = nn.Linear(d, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, G * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, G * Dv, bias=config.qkv_bias)
        self.v_gate_proj = nn.Linear(d, G * Dv, bias=config.qkv_bias) if config.glu_value_dim is not None else None
        self.o_proj = nn.Linear(H * Dv, d, bias=config.o_bias)
        self.q_norm = Norm(config, D, "rms") if config.qk_norm else None
        self.k_norm = Norm(config, D, "rms") if config.qk_norm else None
        self.head_dim = D

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past: Cache,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T = position_ids.shape
        query = self._rotate(self._norm(self.q_proj(x), self.q_norm).reshape(B, T, -1), cos, sin, self.num_heads)
        key = self._rotate(self._norm(self.k_proj(x), self.k_norm).reshape(B, T, -1), cos, sin, self.kv_heads)
        value = self.values(x).reshape(B, T, -1)
        rows = position_ids if attention_mask is None else None
        output, present_key, present_value = grouped_attention(
            query, key, value, *past, rows, attention_mask, self.num_heads, self.kv_heads, self.scale
        )
        return self.o_proj(output.reshape(-1, self.o_proj.in_features)), present_key, present_value

    def values(self, x: Tensor) -> Tensor:
        """x [·, d] → [·, G·Dv], as the cache holds them."""
        value = self.v_proj(x)
        return value if self.v_gate_proj is None else value * nn.functional.silu(self.v_gate_proj(x))

    def _norm(self, x: Tensor, norm: Norm | None) -> Tensor:
        return x if norm is None else norm(x.reshape(-1, self.head_dim))

    def _rotate(self, x_BTHD: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int) -> Tensor:
        if cos is None or sin is None:
            return x_BTHD
        dim = self.rotary_dim if self.rotary_dim != self.head_dim else 0  # 0 is ONNX's word for "all of the head"
        return torch.onnx.ops.rotary_embedding(x_BTHD, cos, sin, num_heads=heads, rotary_embedding_dim=dim)


class Layer(nn.Module):
    """Pre-norm residual block: x + Attention(norm(x)), then x + FFN(norm(x)). x is [B·T, d]."""

    def __init__(self, config: ModelConfig, kv_heads: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config, config.hidden_size)
        self.self_attn = Attention(config, kv_heads)
        self.post_attention_layernorm = Norm(config, config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        past = (past_key, past_value)
        attended, *present = self.self_attn(self.input_layernorm(x), cos, sin, position_ids, attention_mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), *present


class Epilogue(nn.Module):
    """x [B·T, d] → logits [B,1,V] of the last position, or [B,T,V]. `weight` is the head [V, d], tied or not.

    `tokens` [B,T] gives the shape; `scale` is of what the head reads.
    """

    def __init__(self, config: ModelConfig, last_only: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = Norm(config, config.hidden_size)
        self.last_only, self.scale = last_only, scale

    def forward(self, x: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        B, T = tokens.shape
        if self.last_only:
            x, T = x.reshape(B, T, -1).select(1, -1), 1
        x = self.norm(x)
        return nn.functional.linear(x if self.scale == 1.0 else x * self.scale, weight).reshape(B, T, -1)


class Decoder(nn.Module):
    """The whole model under eager torch. `canonical_to_module` gives the state-dict key of a canonical parameter name."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, last_only: bool = False) -> None:
        super().__init__()
        self.config = config
        self.prologue = Prologue(config, dtype)
        self.layers = nn.ModuleList(Layer(config, kv_heads).to(dtype) for kv_heads in config.kv_heads)
        self.epilogue = Epilogue(config, last_only).to(dtype)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past: Sequence[Cache],
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Cache]]:
        """input_ids, position_ids [B,T] → logits and the caches after. Static form unless attention_mask [B,P+T] is given."""
        x, cos, sin = self.prologue(input_ids, position_ids)
        present: list[Cache] = []
        for layer, (past_key, past_value) in zip(self.layers, past, strict=True):
            x, key, value = layer(x, cos, sin, position_ids, attention_mask, past_key, past_value)
            present.append((key, value))
        head = self.prologue.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return self.epilogue(x, position_ids, head), present

    def empty_cache(self, batch: int, length: int, stored: str | None = None) -> list[Cache]:
        """Zeroed caches: `length` is the capacity (static, which may be `stored` as graphs/caches.py has it) or 0 (concat)."""
        weight, sizes = self.prologue.embed_tokens.weight, (self.config.head_dim, self.config.value_dim)
        dtype, widths = STORED[stored] if stored else weight.dtype, [row_width(size, stored or "") for size in sizes]
        rows = [weight.new_zeros((batch, g, length, width), dtype=dtype) for g in self.config.kv_heads for width in widths]
        return list(zip(rows[::2], rows[1::2], strict=True))

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> Decoder:
        """A model in eval mode with `weights` (canonical names) read and cast to `dtype`."""
        with torch.device("meta"):
            model = cls(config, dtype)
        state = {canonical_to_module(name): tensor.read().to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(state, assign=True)
        if model.prologue.rotary is not None:
            model.prologue.rotary.inv_freq = frequencies(config)[0]
        return model.eval().requires_grad_(False)


def canonical_to_module(name: str) -> str:
    """Canonical parameter name → key in Decoder's state dict."""
    if name.startswith("model.embed_"):
        return "prologue." + name.removeprefix("model.")
    if name.startswith("model.norm."):
        return "epilogue." + name.removeprefix("model.")
    return name.removeprefix("model.")
