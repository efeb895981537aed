"""ModelConfig: what a decoder is, frozen and validated once. No torch, no files: a JSON round trip and nothing else.

Shape letters used in the whole project: B batch, T new tokens, S cache capacity, P past tokens, N layers, H query heads,
G KV heads (of one layer), R = H / G query heads a group, D head size of Q and K, Dv head size of V, d hidden size,
V vocabulary size.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from exporter.decode import decode
from exporter.errors import UserError, one_of
from graphs.caches import row_width

FFN_KINDS = ("relu", "gelu", "swish", "glu", "bilinear", "reglu", "geglu", "swiglu")
GATED_FFN_KINDS = FFN_KINDS[3:]
ROPE_KINDS = ("none", "default", "linear", "llama3", "yarn")
NORM_KINDS = ("rms", "layer")

CacheForm = Literal["concat", "static"]
CACHE_FORMS: tuple[CacheForm, ...] = ("concat", "static")
DTYPES = ("fp32", "fp16", "bf16")
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # int8: of caches only


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (RoFormer, arXiv 2104.09864), half-split pairs (i, i + D/2), with the scalings of Hugging Face.

    `fraction` is the share of D that rotates. `original_max_positions` and the factors below it are read by `llama3` and
    `yarn` (arXiv 2309.00071) only; `attention_factor` None means yarn's own 0.1·ln(factor) + 1.
    """

    kind: str = "default"
    theta: float = 10000.0
    fraction: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UserError(one_of("rope kind", self.kind, ROPE_KINDS))
        if not 0.0 < self.fraction <= 1.0:
            raise UserError(f"rope fraction {self.fraction} is outside (0, 1]")
        if self.kind != "none" and not self.theta > 0:
            raise UserError(f"rope theta {self.theta} is not positive")
        if self.kind in ("linear", "llama3", "yarn") and not self.factor > 0:
            raise UserError(f"rope factor {self.factor} is not positive")
        if self.kind in ("llama3", "yarn") and self.original_max_positions <= 0:
            raise UserError(f"rope kind {self.kind} needs original_max_positions, the context the model was first trained on")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and not high > low:
            raise UserError(
                f"rope high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}"
            )
        if self.kind == "yarn" and not (self.theta > 1 and self.beta_fast > 0 and self.beta_slow > 0):
            raise UserError(
                f"rope kind yarn needs theta above 1 and betas above 0, has theta {self.theta}, beta_fast {self.beta_fast}, "
                f"beta_slow {self.beta_slow}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. `kv_heads` holds one number a layer; layers may differ."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    kv_heads: tuple[int, ...]
    head_dim: int
    intermediate_size: int
    max_positions: int
    ffn: str = "swiglu"
    gelu_tanh: bool = False  # GELU and GEGLU: the tanh approximation instead of erf
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: bool = False  # Gemma: the norm multiplies by 1 + w
    embed_scale: float = 1.0  # Gemma: token embeddings times sqrt(d)
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over D on Q and K, before RoPE
    glu_value_dim: int | None = None  # GLU attention: V' = x₁ · SiLU(x₂) with Dv channels a head; None: plain values, Dv = D
    learned_positions: bool = False  # an embedding of each position is added to the token's, instead of RoPE
    tied: bool = True  # the output head is the token embedding
    family: str = "llama"  # the checkpoint family it is written back as
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive = ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim", "intermediate_size", "max_positions")
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise UserError(f"config {name} {value!r} is not a whole number from 1 to 2147483647")
        if len(self.kv_heads) != self.num_layers:
            raise UserError(f"config kv_heads names {len(self.kv_heads)} layers, the model has {self.num_layers}")
        for layer, kv_heads in enumerate(self.kv_heads):
            check_groups(self.num_heads, kv_heads, f"layer {layer}: ")
        if self.ffn not in FFN_KINDS:
            raise UserError(one_of("ffn", self.ffn, FFN_KINDS))
        if self.norm not in NORM_KINDS:
            raise UserError(one_of("norm", self.norm, NORM_KINDS))
        if self.rope.kind != "none" and (self.rotary_dim % 2 or not self.rotary_dim):
            raise UserError(f"rope rotates {self.rotary_dim} of {self.head_dim} channels; RoPE needs an even number")
        if self.glu_value_dim is not None and not 0 < self.glu_value_dim < 2**31:
            raise UserError(f"config glu_value_dim {self.glu_value_dim} is not a whole number from 1 to 2147483647, or null")
        if self.learned_positions and self.rope.kind != "none":
            raise UserError(
                f"config has learned_positions and rope kind {self.rope.kind}; choose rope kind none, or no learned ones"
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise UserError(f"config norm_eps {self.norm_eps} is not a finite number ≥ 0")
        if not (math.isfinite(self.embed_scale) and self.embed_scale > 0):
            raise UserError(f"config embed_scale {self.embed_scale} is not a finite number above 0")
        for token in (*self.eos_token_ids, *((self.bos_token_id,) if self.bos_token_id is not None else ())):
            if not 0 <= token < 2**63:
                raise UserError(f"config has the token id {token}; ids are whole numbers from 0")

    @property
    def rotary_dim(self) -> int:
        """How many of the D channels of a head rotate."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def value_dim(self) -> int:
        """Dv: channels of one head in the V cache, which holds gated values."""
        return self.head_dim if self.glu_value_dim is None else self.glu_value_dim

    @property
    def gated(self) -> bool:
        return self.ffn in GATED_FFN_KINDS

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token of one sequence takes in a KV cache of `dtype`, all layers."""
        width = sum(row_width(size, dtype) for size in (self.head_dim, self.value_dim))
        return sum(self.kv_heads) * width * DTYPE_BYTES[dtype]

    def with_kv_heads(self, kv_heads: int | tuple[int, ...]) -> ModelConfig:
        """The same model with `kv_heads` KV heads in every layer, or one number a layer."""
        per_layer = (kv_heads,) * self.num_layers if isinstance(kv_heads, int) else tuple(kv_heads)
        return dataclasses.replace(self, kv_heads=per_layer)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` wrote. Raises UserError for a key that is unknown, missing, or of another type."""
        return decode(cls, data, "config")


def group_counts(num_heads: int) -> list[int]:
    """The KV-head counts that divide `num_heads`, largest first."""
    small = [g for g in range(1, math.isqrt(num_heads) + 1) if num_heads % g == 0]
    return sorted({*small, *(num_heads // g for g in small)}, reverse=True)


def check_groups(num_heads: int, kv_heads: object, where: str = "") -> None:
    """Refuse a KV-head count that does not divide the query heads, and list those that do."""
    if not isinstance(kv_heads, int) or isinstance(kv_heads, bool) or kv_heads <= 0 or num_heads % kv_heads:
        choices = ", ".join(map(str, group_counts(num_heads)))
        raise UserError(f"{where}{kv_heads} KV heads do not divide {num_heads} query heads; choose from {choices}")


def two_thirds(d_ff: int, multiple_of: int = 1) -> int:
    """d_ff of a gated FFN with the parameters of an ungated one of `d_ff`: two thirds, rounded to the nearest multiple.

    "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2: three matrices instead of two, so d_ff shrinks by 2/3.
    """
    if d_ff <= 0 or multiple_of <= 0:
        raise UserError(f"two_thirds needs positive numbers, got d_ff={d_ff}, multiple_of={multiple_of}")
    return max(multiple_of, round(2 * d_ff / 3 / multiple_of) * multiple_of)
