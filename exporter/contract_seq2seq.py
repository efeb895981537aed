"""Binding names, dtypes, shapes and aliases of an encoder-decoder's graphs, in the names that optimum reads.

encoder  input_ids, attention_mask [B,E] → last_hidden_state [B,E,d], and what the decoder's cross-attention reads, computed
         here once: present.N.encoder.key|value [B,G,E,D].
decoder  input_ids [B,T], in the static form position_ids [B,T] (of the decoder's tokens: 0 is the start token),
         encoder_attention_mask [B,E], and for each layer past_key_values.N.decoder.key|value, its self-attention's cache in
         both forms as exporter/contract.py has them, and past_key_values.N.encoder.key|value, which are only read
         → logits [B,1,V] or [B,T,V], present.N.decoder.key|value.
first    input_ids [B,T], encoder_attention_mask, encoder_hidden_states [B,E,d] → logits and all present.N: the first step as
         optimum takes it; nothing of ours runs it.
"""

from __future__ import annotations

from exporter.config import CacheForm
from exporter.contract import Binding, Logits, cache_pair, logits_output
from exporter.seq2seq_config import Seq2SeqConfig

IDS = ("batch", "encoder")


def names(kind: str, layer: int, stack: str) -> tuple[str, str]:
    """Of K and V; kind is past_key_values or present, stack decoder (self-attention) or encoder (cross-attention)."""
    return f"{kind}.{layer}.{stack}.key", f"{kind}.{layer}.{stack}.value"


def encoder_inputs() -> list[Binding]:
    return [Binding("input_ids", "int64", IDS, "tokens"), Binding("attention_mask", "int64", IDS, "mask")]


def encoder_outputs(config: Seq2SeqConfig, dtype: str) -> list[Binding]:
    hidden = Binding("last_hidden_state", dtype, (*IDS, config.hidden_size), "hidden")
    return [hidden, *(binding for layer in range(config.num_layers) for binding in _read(config, dtype, "present", layer))]


def decoder_inputs(config: Seq2SeqConfig, cache: CacheForm, dtype: str) -> list[Binding]:
    ids = Binding("input_ids", "int64", ("batch", "sequence"), "tokens")
    positions = [Binding("position_ids", "int64", ("batch", "sequence"), "positions")] if cache == "static" else []
    mask = Binding("encoder_attention_mask", "int64", IDS, "mask")
    length, kind = "past" if cache == "concat" else "capacity", "past_key_values"
    caches = [
        binding
        for layer in range(config.num_layers)
        for binding in (*_kept(config, dtype, kind, layer, length), *_read(config, dtype, kind, layer))
    ]
    return [ids, *positions, mask, *caches]


def decoder_outputs(config: Seq2SeqConfig, cache: CacheForm, dtype: str, logits: Logits) -> list[Binding]:
    length = "total" if cache == "concat" else "capacity"
    layers = range(config.num_layers)
    caches = [binding for layer in layers for binding in _kept(config, dtype, "present", layer, length, cache == "static")]
    return [logits_output(config, dtype, logits), *caches]


def first_inputs(config: Seq2SeqConfig, dtype: str) -> list[Binding]:
    return [
        Binding("input_ids", "int64", ("batch", "sequence"), "tokens"),
        Binding("encoder_attention_mask", "int64", IDS, "mask"),
        Binding("encoder_hidden_states", dtype, (*IDS, config.hidden_size), "hidden"),
    ]


def first_outputs(config: Seq2SeqConfig, dtype: str, logits: Logits) -> list[Binding]:
    caches = [
        binding
        for layer in range(config.num_layers)
        for binding in (*_kept(config, dtype, "present", layer, "sequence"), *_read(config, dtype, "present", layer))
    ]
    return [logits_output(config, dtype, logits), *caches]


def _kept(config: Seq2SeqConfig, dtype: str, kind: str, layer: int, length: str, alias: bool = False) -> list[Binding]:
    past = names("past_key_values", layer, "decoder") if alias else None
    return cache_pair(config, dtype, layer, length, names(kind, layer, "decoder"), past)


def _read(config: Seq2SeqConfig, dtype: str, kind: str, layer: int) -> list[Binding]:
    return cache_pair(config, dtype, layer, "encoder", names(kind, layer, "encoder"))
