"""The engines that a variant needs, and what each is planned to be: a decoder's one graph, an encoder-decoder's two.

An encoder-decoder's encoder runs once an input and makes what cross-attention reads; its decoder takes one token a call. Both
leave the length of the input open. A decoder leaves the number of new tokens open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from exporter import contract, contract_seq2seq
from exporter.bundle import Seq2SeqVariant, Variant
from exporter.config import CacheForm
from exporter.contract import Binding

Name = Literal["decoder", "encoder"]
ENGINE_PATTERNS = ("attention", "grouped")


def is_engine_form(pattern: str, cache: CacheForm) -> bool:
    """Whether TensorRT takes graphs of that form."""
    return pattern in ENGINE_PATTERNS and cache == "static"


def unfit(variant: Variant) -> str | None:
    """Why `variant` cannot become an engine; None where it can."""
    if not is_engine_form(variant.pattern, variant.cache):
        return (
            f"{variant.name} ({variant.pattern}, {variant.cache} cache) cannot become an engine; TensorRT takes the patterns "
            f"{' and '.join(ENGINE_PATTERNS)} with a static cache: headpool export … --pattern attention"
        )
    size = max(variant.config.head_dim, variant.config.value_dim)
    if variant.pattern == "attention" and (size % 8 or not 16 <= size <= 256):
        return (
            f"{variant.name} has heads of {size} channels; TensorRT fuses attention for multiples of 8 from 16 to 256: "
            "take a variant of pattern grouped, headpool export … --pattern grouped"
        )
    return None


@dataclass(frozen=True)
class Attention:
    """One attention layer. `query` is the weight of the linear layer that makes its queries, `key` and `value` are tensors that
    it reads as they are, or such weights; `mask` are inputs and weights that its mask is made from, first the one that says
    which rows are seen. `decomposable`: TensorRT has no fused kernel for it; `rotated`: Q and K are, by their positions."""

    name: str  # as a deviation is told: "layer 3"
    query: str
    key: str
    value: str
    kv_heads: int
    mask: tuple[str, ...]
    scale: float
    decomposable: bool = False
    rotated: bool = False


@dataclass(frozen=True)
class Part:
    """One graph of a variant on its way to an engine.

    `caches` are written in place: input, output, and the weight of the linear layer whose output is written. `made` are
    outputs that are made once an input, each by the linear layer of the weight beside it. `grows` is the dimension that stays
    open; `known` are those that are the same number in every engine.
    """

    name: Name
    variant: Variant
    graph: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    attention: tuple[Attention, ...]
    caches: tuple[tuple[str, str, str], ...] = ()
    made: tuple[tuple[str, str], ...] = ()
    grows: str = "encoder"
    known: Mapping[str, int] = field(default_factory=dict)

    @property
    def rotated(self) -> bool:
        """Whether the keys that are written are rotated by their positions."""
        return any(attention.rotated for attention in self.attention)

    @property
    def label(self) -> str:
        """For a person: the variant, and which of its graphs where it has two."""
        return f"{self.variant.name} {self.name}" if isinstance(self.variant, Seq2SeqVariant) else self.variant.name

    def sizes(self, batch: int, capacity: int) -> dict[str, int]:
        """Dimension → its number, for those that an engine fixes: B sequences, S cache rows each."""
        return {"batch": batch, "capacity": capacity, **self.known}


def shape(binding: Binding, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The binding's shape with the numbers in it; what stays open is −1."""
    return tuple(sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in binding.shape)


def parts_of(variant: Variant) -> tuple[Part, ...]:
    """In the order they run in; the one that decodes comes last."""
    return (_encoder(variant), _step(variant)) if isinstance(variant, Seq2SeqVariant) else (_decoder(variant),)


def _decoder(variant: Variant) -> Part:
    """TensorRT's fused kernels of several queries are fp16 and bf16: in fp32 attention may be taken apart."""
    config, layers = variant.config, range(variant.config.num_layers)
    attention = [
        Attention(
            f"layer {layer}",
            f"model.layers.{layer}.self_attn.q_proj.weight",
            *contract.present_names(layer),
            kv_heads,
            ("position_ids",),
            config.head_dim**-0.5,
            decomposable=variant.dtype == "fp32",
            rotated=config.rope.kind != "none",
        )
        for layer, kv_heads in enumerate(config.kv_heads)
    ]
    caches = [
        (past, present, f"model.layers.{layer}.self_attn.{x}_proj.weight")
        for layer in layers
        for past, present, x in zip(contract.past_names(layer), contract.present_names(layer), "kv", strict=True)
    ]
    given = (tuple(variant.inputs()), tuple(variant.outputs()))
    return Part("decoder", variant, variant.graph, *given, tuple(attention), tuple(caches), grows="sequence")


def _step(variant: Seq2SeqVariant) -> Part:
    """A T5's decoder: T is 1, the scores are not scaled, the mask of self-attention holds the bias of relative positions."""
    attention, caches = list[Attention](), list[tuple[str, str, str]]()
    for layer, kv_heads in enumerate(variant.config.kv_heads):
        past, present, read = (
            contract_seq2seq.names(kind, layer, stack)
            for kind, stack in (("past_key_values", "decoder"), ("present", "decoder"), ("past_key_values", "encoder"))
        )
        weights = (f"decoder.layers.{layer}.self_attn.{x}_proj.weight" for x in "kv")
        caches += zip(past, present, weights, strict=True)
        own, cross = (f"decoder.layers.{layer}.{kind}_attn.q_proj.weight" for kind in ("self", "cross"))
        attention.append(Attention(f"layer {layer}", own, *present, kv_heads, ("position_ids", "decoder.bias.weight"), 1.0))
        mask = ("encoder_attention_mask",)
        attention.append(Attention(f"layer {layer}'s cross-attention", cross, *read, kv_heads, mask, 1.0))
    given = (tuple(variant.inputs()), tuple(variant.outputs()))
    return Part("decoder", variant, variant.graph, *given, tuple(attention), tuple(caches), known={"sequence": 1})


def _encoder(variant: Seq2SeqVariant) -> Part:
    """Its attention is of several queries, too (see `_decoder`)."""
    config = variant.config
    attention = [
        Attention(
            f"encoder layer {layer}",
            f"encoder.layers.{layer}.self_attn.q_proj.weight",
            f"encoder.layers.{layer}.self_attn.k_proj.weight",
            f"encoder.layers.{layer}.self_attn.v_proj.weight",
            config.num_heads,
            ("attention_mask", "encoder.bias.weight"),
            1.0,
            decomposable=variant.dtype == "fp32",
        )
        for layer in range(config.encoder_layers)
    ]
    made = [
        (name, f"decoder.layers.{layer}.cross_attn.{x}_proj.weight")
        for layer in range(config.num_layers)
        for name, x in zip(contract_seq2seq.names("present", layer, "encoder"), "kv", strict=True)
    ]
    given = (tuple(variant.encoder_inputs()), tuple(variant.encoder_outputs()))
    return Part("encoder", variant, variant.encoder, *given, tuple(attention), made=tuple(made))
