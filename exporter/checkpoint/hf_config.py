"""Hugging Face config.json ↔ ModelConfig. What headpool does not implement is refused by name, with the key and its value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint.families import ACTIVATIONS, FAMILIES, HEADPOOL, Family
from exporter.checkpoint.own_config import own_config, parse_own
from exporter.checkpoint.rope_config import finite, parse_rope, rope_keys
from exporter.checkpoint.t5_config import read_t5, t5_keys
from exporter.config import ModelConfig
from exporter.errors import CheckpointError, UserError, one_of
from exporter.models.rope import frequencies
from exporter.seq2seq_config import Seq2SeqConfig

# As DeciLM names them (Deci AI, huggingface.co/Deci/DeciLM-7B); transformers' own families have no such key.
PER_LAYER = "num_key_value_heads_per_layer"
# Larger numbers are damage, and would only be found after much time and memory.
LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers"), 4096),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 65536),
}
REFUSED_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "use_bidirectional_attention", "per_layer_config")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        text = path.read_bytes()
        if not text.strip():
            raise ValueError("it is empty")
        data = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def parse_config(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: object = "config.json"
) -> ModelConfig:
    """The model a config.json describes. `generation` is generation_config.json, whose token ids come first.

    Reads the keys of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters). Raises CheckpointError for every
    feature that is not implemented.
    """
    try:
        if hf.get("model_type") == HEADPOOL.model_type:
            config = parse_own(hf)
            own = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
            bos, eos = (_first_token_ids(key, own, generation or {}) for key in own)
            return replace(config, bos_token_id=bos[0] if bos else None, eos_token_ids=eos)
        return _finite(Reader(hf).config(generation or {}))
    except UserError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _finite(config: ModelConfig) -> ModelConfig:
    """No head has as many channels as a damaged file may say; such a config is refused by the shapes of its weights."""
    if config.rope.kind != "none" and config.rotary_dim < 1 << 16 and not frequencies(config)[0].isfinite().all():
        raise UserError(f"the numbers of RoPE scaling {config.rope.kind} give frequencies that are not finite")
    return config


class Reader:
    """config.json with the family's defaults behind it."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        model_type = hf.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(one_of("model_type", model_type, FAMILIES))
        self.family: Family = FAMILIES[model_type]
        self.hf = {**self.family.defaults, **hf}

    def config(self, generation: Mapping[str, Any]) -> ModelConfig:
        self.refuse_features()
        family, hf = self.family, self.hf
        if family.seq2seq:
            return read_t5(self, generation)
        if hf.get("is_encoder_decoder"):
            raise UserError(f"is_encoder_decoder is set, and model_type {hf['model_type']!r} has no encoder")
        layers, heads, hidden = (self.size(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        if hf.get("head_dim") is None and hidden % heads:
            raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
        head_dim = hidden // heads if hf.get("head_dim") is None else self.size("head_dim")
        ffn, gelu_tanh = self.activation()
        max_positions = self.size("max_position_embeddings")
        self.refuse_window(max_positions, layers)
        bos = self.token_ids("bos_token_id", generation)
        return ModelConfig(
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            kv_heads=self.kv_heads(layers, heads),
            head_dim=head_dim,
            intermediate_size=self.size("intermediate_size"),
            max_positions=max_positions,
            ffn=ffn,
            gelu_tanh=gelu_tanh,
            norm=family.norm,
            norm_eps=self.number(family.eps_key),
            norm_offset=family.norm_offset,
            embed_scale=math.sqrt(hidden) if family.scaled_embeddings else 1.0,
            rope=parse_rope(hf, family, max_positions),
            qkv_bias=self.flag(family.qkv_bias),
            o_bias=self.flag(family.o_bias),
            ffn_bias=self.flag(family.ffn_bias),
            qk_norm=family.qk_norm,
            tied=self.flag("tie_word_embeddings"),
            family=family.model_type,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=self.token_ids("eos_token_id", generation),
        )

    def token_ids(self, key: str, generation: Mapping[str, Any]) -> tuple[int, ...]:
        return _first_token_ids(key, self.hf, generation)

    def kv_heads(self, layers: int, heads: int) -> tuple[int, ...]:
        """One number for all layers, unless the key that names one for each is there."""
        named = self.hf.get(PER_LAYER)
        if named is None:
            return (heads if self.hf.get("num_key_value_heads") is None else self.size("num_key_value_heads"),) * layers
        if not isinstance(named, list) or len(named) != layers or not all(type(count) is int for count in named):
            raise UserError(f"{PER_LAYER} {named!r:.60} is not a list of {layers} whole numbers, one a layer")
        return tuple(named)

    def size(self, key: str) -> int:
        value = self.hf.get(key)
        limit = LIMITS.get(key, 2**31 - 1)
        if key not in self.hf:
            raise UserError(f"lacks {key}")
        if type(value) is not int or not 1 <= value <= limit:
            raise UserError(f"{key} {value!r} is not a whole number from 1 to {limit}")
        return value

    def number(self, key: str) -> float:
        value = finite(self.hf.get(key))
        if value is None:
            raise UserError(f"{key} {self.hf.get(key)!r} is not a finite number")
        return value

    def flag(self, key: bool | str) -> bool:
        value = key if isinstance(key, bool) else self.hf.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{key} {value!r} is neither true nor false")
        return bool(value)

    def activation(self) -> tuple[str, bool]:
        name = self.hf.get("hidden_act")
        if self.family.model_type == "gemma" and name == "gelu":
            name = "gelu_pytorch_tanh"  # what Gemma's first configs meant (transformers pull request 29402)
        other = self.hf.get("hidden_activation")
        if other is not None and other != name:
            raise UserError(f"hidden_activation {other!r} contradicts hidden_act {name!r}")
        gated = self.family.gated
        choices = {key: kinds[gated] for key, kinds in ACTIVATIONS.items() if kinds[gated]}
        if not isinstance(name, str) or name not in choices:
            raise UserError(one_of("hidden_act", name, choices))
        return str(choices[name]), ACTIVATIONS[name][2]

    def refuse_features(self) -> None:
        if quantization := self.hf.get("quantization_config"):
            method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
            raise UserError(f"quantization_config {method!r} is not supported; use the checkpoint's F32, F16 or BF16 weights")
        asked = {key: self.hf.get(key) for key in REFUSED_KEYS} | {"is_causal": not self.hf.get("is_causal", True)}
        for key in filter(asked.get, asked):
            raise UserError(f"{key} {self.hf[key]!r} is not supported; headpool exports dense causal decoders and T5")

    def refuse_window(self, max_positions: int, layers: int) -> None:
        """Sliding windows that some layer obeys and that are shorter than the context."""
        key, window = "sliding_window", self.hf.get("sliding_window")
        if self.family.window == "none":
            return
        if self.family.window == "layers":
            window = window if self.flag("use_sliding_window") else None
            types = self.hf.get("layer_types")
            if types is None:
                first = self.size("max_window_layers") if "max_window_layers" in self.hf else 28
                types = [
                    "sliding_attention" if window is not None and layer >= first else "full_attention"
                    for layer in range(layers)
                ]
            if not isinstance(types, list) or any(kind not in ("full_attention", "sliding_attention") for kind in types):
                raise UserError(f"layer_types {types!r} is not a list of full_attention and sliding_attention")
            if "sliding_attention" not in types:
                return
            if window is None:
                raise UserError("layer_types has sliding_attention, but use_sliding_window is off")
        if window is None:
            return
        if type(window) is not int or window < 1:
            raise UserError(f"{key} {window!r} is not a whole number ≥ 1")
        if window < max_positions:
            raise UserError(
                f"{key} {window} is shorter than max_position_embeddings {max_positions}, and sliding windows are not "
                f"supported; set max_position_embeddings to {window} in config.json to use the model up to there"
            )


def _first_token_ids(key: str, hf: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json's before config.json's; neither may be anything else."""
    own, first = _token_ids(key, hf.get(key)), generation.get(key)
    return own if first is None else _token_ids(key, first)


def _token_ids(key: str, value: object) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in values):
        raise UserError(f"{key} {value!r} is neither a token id nor a list of them")
    return tuple(values)


def hf_config_for(config: ModelConfig, hf: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`hf` brought up to date with `config`: KV heads, dtype, and RoPE in the keys of both transformers 4 and 5.

    KV heads that differ from layer to layer stand under PER_LAYER, which headpool reads; transformers refuses such weights as
    misshapen. So it does those of a T5 with fewer KV heads, for which it has no key: `num_key_value_heads` there is ours.
    Raises CheckpointError where the result would not describe `config`.
    """
    if config.family == HEADPOOL.model_type:
        return own_config(config, dtype)
    new = dict(hf)
    name = str(dtype).removeprefix("torch.")
    new.pop("torch_dtype" if "dtype" in new else "dtype", None)
    new["dtype" if "dtype" in new else "torch_dtype"] = name
    new["architectures"] = [FAMILIES[config.family].architecture]
    new.update(t5_keys(config) if isinstance(config, Seq2SeqConfig) else rope_keys(hf))
    new["num_key_value_heads"] = max(config.kv_heads)
    if isinstance(config, Seq2SeqConfig) and set(config.kv_heads) == {config.num_heads}:
        del new["num_key_value_heads"]  # a plain T5, which has no such key
    new.pop(PER_LAYER, None)
    if len(set(config.kv_heads)) > 1:
        new[PER_LAYER] = list(config.kv_heads)
    # The token ids may have come from generation_config.json.
    ids = ("bos_token_id", "eos_token_ids", *(["decoder_start_id"] if isinstance(config, Seq2SeqConfig) else []))
    again = replace(parse_config(new), **{name: getattr(config, name) for name in ids})
    if again != config:
        differs = [key for key, value in config.to_json().items() if again.to_json()[key] != value]
        raise CheckpointError(f"a {config.family} config.json cannot say this model's {', '.join(differs)}")
    return new
