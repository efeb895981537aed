"""The attention weights of one layer as arrays of heads: what conversions compute with.

Biases are the last column of the projections, read by an input that ends in 1, so that no method needs to know of them:
e is d, or d + 1 where Q, K and V have biases. L KV heads, H query heads, R = H / L of them to a KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.checkpoint import expected_shapes
from exporter.config import ModelConfig
from exporter.errors import CheckpointError
from exporter.weights import Weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "v_gate_proj")


@dataclass(frozen=True)
class AttentionWeights:
    """query [H,D,e], key [L,D,e], value [L,Dv,e], output [d,H,Dv]; the bias of the output, where there is one, is not here.

    `norms` are what QK-norm multiplies with, [D] for queries and for keys, which all heads share. `asking` [e,e] are the second
    moments of what queries are made from, where that is not what keys are made from: in cross-attention. `gate` [L,Dv,e] is
    there in GLU attention alone, whose values are (value · x) ⊙ SiLU(gate · x).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    norms: tuple[Tensor, Tensor] | None = None
    asking: Tensor | None = None
    gate: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.key.shape[0]

    @classmethod
    def read(cls, config: ModelConfig, weights: Weights, layer: int, dtype: torch.dtype) -> AttentionWeights:
        """Layer `layer` of canonical `weights`, cast to `dtype`."""
        H, G, D, Dv = config.num_heads, config.kv_heads[layer], config.head_dim, config.value_dim
        prefix = f"model.layers.{layer}.self_attn."

        def read(name: str) -> Tensor:
            value = weights[prefix + name].read()
            if not value.isfinite().all():  # no decomposition of such a matrix ends well
                raise CheckpointError(f"tensor {prefix + name!r} holds NaN or infinite values; the checkpoint is damaged")
            return value.to(dtype)

        def heads(name: str, count: int, size: int) -> Tensor:
            matrix = read(f"{name}.weight")
            if config.qkv_bias:
                matrix = torch.cat([matrix, read(f"{name}.bias")[:, None]], dim=1)
            return matrix.unflatten(0, (count, size))

        output = read("o_proj.weight").unflatten(1, (H, Dv))
        offset = float(config.norm_offset)
        norms = (read("q_norm.weight") + offset, read("k_norm.weight") + offset) if config.qk_norm else None
        gate = heads("v_gate_proj", G, Dv) if config.glu_value_dim is not None else None
        return cls(heads("q_proj", H, D), heads("k_proj", G, D), heads("v_proj", G, Dv), output, norms, gate=gate)

    def tensors(self, config: ModelConfig, layer: int) -> dict[str, Tensor]:
        """Canonical name → tensor, as a checkpoint holds them: those of `attention_shapes`."""
        prefix = f"model.layers.{layer}.self_attn."
        found = {prefix + "o_proj.weight": self.output.flatten(1)}
        for name, heads in zip(PROJECTIONS, (self.query, self.key, self.value, self.gate), strict=True):
            if heads is None:
                continue
            rows = heads.flatten(0, 1)
            found[f"{prefix}{name}.weight"] = rows[:, : config.hidden_size]
            if config.qkv_bias:
                found[f"{prefix}{name}.bias"] = rows[:, config.hidden_size]
        return found

    def to(self, dtype: torch.dtype) -> AttentionWeights:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype)

        norms = None if self.norms is None else (cast(self.norms[0]), cast(self.norms[1]))
        asking = None if self.asking is None else cast(self.asking)
        kept = self._of_kv_heads(cast)
        return replace(kept, query=cast(self.query), output=cast(self.output), norms=norms, asking=asking)

    def degrouped(self, kv_heads: int) -> AttentionWeights:
        """The same attention with each KV head repeated until there are `kv_heads`, a multiple of those there are."""
        times = kv_heads // self.kv_heads
        return self._of_kv_heads(lambda heads: heads.repeat_interleave(times, 0))

    def ordered(self, order: list[int]) -> AttentionWeights:
        """The same attention with its KV heads in another order, and with them the query heads that read them."""
        index = torch.tensor(order)
        reading = torch.arange(self.query.shape[0]).unflatten(0, (self.kv_heads, -1))[index].flatten()
        kept = self._of_kv_heads(lambda heads: heads[index])
        return replace(kept, query=self.query[reading], output=self.output[:, reading])

    def _of_kv_heads(self, change: Callable[[Tensor], Tensor]) -> AttentionWeights:
        """`change` of all that a KV head has: K, V and gate."""
        gate = None if self.gate is None else change(self.gate)
        return replace(self, key=change(self.key), value=change(self.value), gate=gate)


def attention_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of what `AttentionWeights` holds of one layer."""
    prefix = f"model.layers.{layer}.self_attn."
    kept = {f"{prefix}o_proj.weight", *(f"{prefix}{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias"))}
    return {name: shape for name, shape in expected_shapes(config).items() if name in kept}


def check_attention(config: ModelConfig, weights: Weights) -> None:
    """Refuse, before any work, attention weights that are missing or have another shape than the config says."""
    for layer in range(config.num_layers):
        for name, shape in attention_shapes(config, layer).items():
            if name not in weights:
                raise CheckpointError(f"the checkpoint lacks {name}")
            if weights[name].shape != shape:
                raise CheckpointError(f"{name} is {list(weights[name].shape)}, its config says {list(shape)}")
