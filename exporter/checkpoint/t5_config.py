"""T5's config.json → Seq2SeqConfig, and back. What headpool does not implement is refused by name.

Whether the head is tied, and its input scaled, stands in one key, `tie_word_embeddings`: T5 1.0 does both, T5.1.1 and mT5
neither. transformers 5 writes it as true whatever the model is, and what it really does in `scale_decoder_outputs`; there the
weights tell whether the head is tied (`settle_head`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.checkpoint.families import ACTIVATIONS
from exporter.config import RopeConfig
from exporter.errors import UserError, one_of
from exporter.seq2seq_config import ENDLESS, Seq2SeqConfig

if TYPE_CHECKING:
    from exporter.checkpoint.hf_config import Reader

SCALES, START = "scale_decoder_outputs", "decoder_start_token_id"
POSITION_KEYS = ("position_embedding_type", "rope_parameters", "rope_scaling", "rope_theta", "encoder_attention_type")
OTHER_MODELS = ("EncoderModel", "Classification", "QuestionAnswering")


def read_t5(reader: Reader, generation: Mapping[str, Any]) -> Seq2SeqConfig:
    """The model of a T5's config.json. Raises UserError."""
    hf = reader.hf
    _refuse_other_models(hf)
    for key in POSITION_KEYS:
        if hf.get(key) not in (None, "relative"):
            raise UserError(
                f"{key} {hf[key]!r:.60} is not supported; a T5 has relative positions in buckets, which headpool reads"
            )
    heads, hidden = reader.size("num_heads"), reader.size("d_model")
    layers = reader.size("num_layers")
    decoder_layers = layers if hf.get("num_decoder_layers") is None else reader.size("num_decoder_layers")
    ffn, gelu_tanh = _activation(hf)
    tied = reader.flag("tie_word_embeddings")
    scaled = reader.flag(SCALES) if SCALES in hf else tied and hf["model_type"] == "t5"
    named = (generation.get(START), hf.get(START), hf.get("pad_token_id"))  # as transformers looks for it
    start = next((token for token in named if token is not None), None)
    if type(start) is not int:
        raise UserError(f"{START} {start!r} is not a token id")
    return Seq2SeqConfig(
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        num_layers=decoder_layers,
        num_heads=heads,
        kv_heads=reader.kv_heads(decoder_layers, heads),
        head_dim=reader.size("d_kv"),
        intermediate_size=reader.size("d_ff"),
        max_positions=ENDLESS,
        ffn=ffn,
        gelu_tanh=gelu_tanh,
        norm_eps=reader.number("layer_norm_epsilon"),
        rope=RopeConfig("none"),
        tied=tied,
        family=hf["model_type"],
        bos_token_id=None,
        eos_token_ids=reader.token_ids("eos_token_id", generation),
        encoder_layers=layers,
        relative_buckets=reader.size("relative_attention_num_buckets"),
        relative_max_distance=reader.size("relative_attention_max_distance"),
        head_scale=hidden**-0.5 if scaled else 1.0,
        decoder_start_id=start,
    )


def t5_keys(config: Seq2SeqConfig) -> dict[str, Any]:
    """The keys of config.json that conversions and transformers 5's way of writing them may have changed."""
    scaled, expected = config.head_scale != 1.0, config.tied and config.family == "t5"
    keys: dict[str, Any] = {"tie_word_embeddings": config.tied}
    return keys if scaled == expected else {**keys, SCALES: scaled}


def settle_head(config: Seq2SeqConfig, hf: Mapping[str, Any], has_own_head: bool) -> Seq2SeqConfig:
    """`config` with its head tied or not as the weights have it, where transformers 5 wrote the folder."""
    return dataclasses.replace(config, tied=not has_own_head) if SCALES in hf or config.family == "mt5" else config


def _activation(hf: Mapping[str, Any]) -> tuple[str, bool]:
    """Of feed_forward_proj: `relu`, `gated-gelu` and the like; gated-gelu means the tanh approximation, gelu_new, as
    transformers reads it. What that means it writes under keys of their own, too, and computes what those say."""
    name = hf.get("feed_forward_proj")
    choices = {plain: (plain, False) for plain, kinds in ACTIVATIONS.items() if kinds[0]}
    choices |= {f"gated-{plain}": (plain, True) for plain, kinds in ACTIVATIONS.items() if kinds[1]}
    choices["gated-gelu"] = ("gelu_new", True)
    if not isinstance(name, str) or name not in choices:
        raise UserError(one_of("feed_forward_proj", name, choices))
    plain, gated = choices[name]
    for key, meant in (("dense_act_fn", plain), ("is_gated_act", gated)):
        if hf.get(key) not in (None, meant):
            raise UserError(f"{key} {json.dumps(hf[key])} is not what feed_forward_proj {name!r} means, {json.dumps(meant)}")
    kind, glu, gelu_tanh = ACTIVATIONS[plain]
    kind = glu if gated else kind
    assert kind is not None
    return kind, gelu_tanh


def _refuse_other_models(hf: Mapping[str, Any]) -> None:
    if hf.get("is_encoder_decoder") is False:
        raise UserError("is_encoder_decoder is false: that is half of a T5; headpool needs its encoder and its decoder")
    named = hf.get("architectures") or []
    other = [name for name in named if isinstance(name, str) and name.endswith(OTHER_MODELS)] if isinstance(named, list) else []
    if other:
        raise UserError(f"architectures {other[0]!r} has no encoder and decoder that generate text; give one that has")
