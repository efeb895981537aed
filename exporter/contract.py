"""The one source of binding names, dtypes, shapes and aliases of a decoder graph.

Both cache forms name their caches `past_key_values.N.key|value` (input) and `present.N.key|value` (output).

concat  inputs input_ids [B,T], attention_mask [B,P+T], position_ids [B,T], caches [B,G,P,D]; present is [B,G,P+T,D].
static  inputs input_ids [B,T], position_ids [B,T], caches [B,G,S,D]; present [B,G,S,D] is the same memory as past. New
        keys and values go to rows position_ids[:,0] … position_ids[:,0]+T−1; a query sees the rows up to its own position.
        The caches' rows may be stored in a form of graphs/caches.py: fp16 [B,G,S,D], or int8 [B,G,S,D+4].
Output  logits [B,1,V] for the last position, or [B,T,V].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from exporter.config import CacheForm, ModelConfig
from graphs.caches import row_width

Role = Literal["tokens", "mask", "positions", "logits", "cache", "hidden"]
Logits = Literal["last", "all"]


@dataclass(frozen=True)
class Binding:
    """One graph input or output. `shape` mixes numbers and the symbols batch, sequence, past, total, capacity.

    `alias` names the input whose memory a static `present` output shares.
    """

    name: str
    dtype: str  # int64, fp32, fp16, bf16, or of a cache int8
    shape: tuple[int | str, ...]
    role: Role
    layer: int | None = None
    alias: str | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "role": self.role}
        if self.layer is not None:
            data["layer"] = self.layer
        if self.alias is not None:
            data["alias"] = self.alias
        return data


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


def inputs(config: ModelConfig, cache: CacheForm, dtype: str, stored: str | None = None) -> list[Binding]:
    """Graph inputs in order. `stored` is the dtype of the caches where that is not `dtype`."""
    ids = Binding("input_ids", "int64", ("batch", "sequence"), "tokens")
    mask = Binding("attention_mask", "int64", ("batch", "total"), "mask")
    positions = Binding("position_ids", "int64", ("batch", "sequence"), "positions")
    length = "past" if cache == "concat" else "capacity"
    layers = range(config.num_layers)
    kind = stored or dtype
    caches = [binding for layer in layers for binding in cache_pair(config, kind, layer, length, past_names(layer))]
    return [ids, *([mask] if cache == "concat" else []), positions, *caches]


def outputs(
    config: ModelConfig, cache: CacheForm, dtype: str, logits: Logits = "last", stored: str | None = None
) -> list[Binding]:
    """Graph outputs in order. `stored` is the dtype of the caches where that is not `dtype`."""
    length = "total" if cache == "concat" else "capacity"
    caches: list[Binding] = []
    for layer in range(config.num_layers):
        past = past_names(layer) if cache == "static" else None
        caches += cache_pair(config, stored or dtype, layer, length, present_names(layer), past)
    return [logits_output(config, dtype, logits), *caches]


def cache_pair(
    config: ModelConfig, dtype: str, layer: int, length: str, names: tuple[str, str], past: tuple[str, str] | None = None
) -> list[Binding]:
    """K and V of one layer, in the memory of the inputs `past` where those are named."""
    sizes = (config.head_dim, config.value_dim)
    return [
        Binding(name, dtype, ("batch", config.kv_heads[layer], length, row_width(size, dtype)), "cache", layer, alias)
        for name, size, alias in zip(names, sizes, past or (None, None), strict=True)
    ]


def logits_output(config: ModelConfig, dtype: str, logits: Logits) -> Binding:
    return Binding("logits", dtype, ("batch", 1 if logits == "last" else "sequence", config.vocab_size), "logits")
