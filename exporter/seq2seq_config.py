"""Seq2SeqConfig: an encoder beside the decoder that ModelConfig describes, as T5 has it (Raffel et al. 2020, arXiv 1910.10683).

All that ModelConfig says is of the decoder; of the encoder too, but for `num_layers` and `kv_heads`: the encoder has
`encoder_layers` layers and keeps a KV head for every query head. A decoder layer's `kv_heads` are those of its self-attention
and of its cross-attention. Another shape letter: E tokens of the encoder's input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from exporter.config import ModelConfig
from exporter.errors import UserError

# Relative positions end nowhere; a number that no memory holds stands for that.
ENDLESS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(ModelConfig):
    """A T5: RMSNorm, no biases, unscaled scores, relative positions in buckets that a stack shares."""

    encoder_layers: int
    relative_buckets: int = 32
    relative_max_distance: int = 128
    head_scale: float = 1.0  # of the last hidden state, before the output head: T5 1.0 multiplies by d^-0.5
    decoder_start_id: int = 0  # the token that every output begins with

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.encoder_layers < 2**31:
            raise UserError(f"config encoder_layers {self.encoder_layers} is not a whole number from 1")
        if not 4 <= self.relative_buckets < 2**15:
            raise UserError(f"config relative_buckets {self.relative_buckets} is not a whole number from 4 to 32767")
        if not self.relative_buckets // 2 < self.relative_max_distance < 2**20:
            raise UserError(
                f"config relative_max_distance {self.relative_max_distance} is not more than half of its "
                f"{self.relative_buckets} relative_buckets and below 1048576"
            )
        if not (math.isfinite(self.head_scale) and self.head_scale > 0):
            raise UserError(f"config head_scale {self.head_scale} is not a finite number above 0")
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise UserError(f"config decoder_start_id {self.decoder_start_id} is outside the vocabulary of {self.vocab_size}")
        unknown = ("glu_value_dim", "qkv_bias", "o_bias", "ffn_bias", "qk_norm", "norm_offset", "learned_positions")
        lacking = [name for name in unknown if getattr(self, name)]
        lacking += [f"rope {self.rope.kind}"] if self.rope.kind != "none" else []
        lacking += [f"norm {self.norm}"] if self.norm != "rms" else []
        if lacking:  # the first one, which may have brought others with it
            raise UserError(f"an encoder-decoder with {lacking[0]} is not implemented")


def require_decoder(config: ModelConfig, name: object, what: str) -> None:
    """Refuse an encoder-decoder where only a decoder will do. `what` is the work, `name` the model's."""
    if isinstance(config, Seq2SeqConfig):
        raise UserError(f"{name} is an encoder-decoder ({config.family}); {what} takes decoder-only models")
