"""Is a parsed network what was planned? Read from TensorRT's own network, not from the ONNX it came from.

The parser drops or changes what it has no layer for, often with a warning only: `is_causal` becomes upper-left causality, which
is wrong for decoding; `nonpad_kv_seqlen` is left out; a cache update of another form becomes a copy. Each check below names
what deviates; a network with a deviation is not built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exporter import contract
from exporter.bundle import Variant
from exporter.engines.tensorrt.network import Layer, Network, Tensor
from exporter.errors import GraphError


@dataclass(frozen=True)
class Sizes:
    """The numbers an engine fixes: B sequences, S cache rows each."""

    batch: int
    capacity: int

    def shape(self, binding: contract.Binding) -> tuple[int, ...]:
        """The binding's shape with the numbers in it; T is −1."""
        known = {"batch": self.batch, "capacity": self.capacity, "sequence": -1}
        return tuple(known[dim] if isinstance(dim, str) else dim for dim in binding.shape)


def verify(network: Network, variant: Variant, sizes: Sizes, quantised: int = 0) -> dict[str, Any]:
    """Facts about the network, for engine.json; `quantised` is how many weights are dequantised in it.

    Raises GraphError naming the first deviation and how many there are.
    """
    deviations = [
        *check_bindings(network, variant, sizes),
        *check_caches(network, variant),
        *(check_fused(network, variant) if variant.pattern == "attention" else check_grouped(network, variant)),
        *check_casts(network, variant),
        *check_quantised(network, quantised),
        *check_used(network),  # last: where an input is not used, another check often says why
    ]
    if deviations:
        more = f" (and {len(deviations) - 1} more deviations)" if len(deviations) > 1 else ""
        raise GraphError(
            f"{variant.graph}, as TensorRT parsed it, is not what variant {variant.name} plans: {deviations[0]}{more}"
        )
    return facts(network, variant)


def facts(network: Network, variant: Variant) -> dict[str, Any]:
    config = variant.config
    heads = [f"{config.num_heads}:{kv_heads}" for kv_heads in config.kv_heads]
    return {
        "layers": len(network.layers),
        "fused_attention": len(network.of("ATTENTION_INPUT")),
        "cache_updates": len(network.of("KV_CACHE_UPDATE")),
        "dequantised_weights": len(network.of("DEQUANTIZE")),
        "heads": heads[0] if len(set(heads)) == 1 else heads,
        "causal": sorted({layer.details["causal"] for layer in network.of("ATTENTION_INPUT")}),
        "unused_inputs": 0,
    }


def check_bindings(network: Network, variant: Variant, sizes: Sizes) -> Iterator[str]:
    """Inputs and outputs have the contract's names, dtypes and shapes, and no others."""
    for what, wanted, found in (
        ("input", variant.inputs(), network.inputs),
        ("output", variant.outputs(), network.outputs),
    ):
        for binding in wanted:
            plan = Tensor(binding.name, binding.dtype, sizes.shape(binding))
            there = found.get(binding.name)
            if there is None or there.dtype != plan.dtype or not _same_shape(there.shape, plan.shape, binding.role):
                have = "is missing" if there is None else f"is {there.dtype} {list(there.shape)}"
                yield f"{what} {binding.name} {have}, planned {plan.dtype} {list(plan.shape)}"
        for name in set(found) - {binding.name for binding in wanted}:
            yield f"{what} {name} is not in the contract"


def _same_shape(found: tuple[int, ...], planned: tuple[int, ...], role: contract.Role) -> bool:
    """The logits of all positions come out of a Reshape that leaves V open; the builder finds it."""
    same = [f == p or (f == -1 and role == "logits") for f, p in zip(found, planned, strict=False)]
    return len(found) == len(planned) and all(same)


def check_used(network: Network) -> Iterator[str]:
    """Every input is read, and every layer's result is: what the parser ignores stands in the network with no reader."""
    for name in network.inputs:
        if name not in network.takers:
            yield f"input {name} is not used"
    for layer in network.layers:
        if not any(out.name in network.takers or out.name in network.outputs for out in layer.outputs):
            yield f"the result of {layer.name or layer.kind} is not used: an input of a node was ignored"


def check_caches(network: Network, variant: Variant) -> Iterator[str]:
    """Every cache tensor is written in place: an IKVCacheUpdateLayer whose input is the past and whose output the present."""
    for layer in range(variant.config.num_layers):
        for past, present in zip(contract.past_names(layer), contract.present_names(layer), strict=True):
            update = network.producer.get(present)
            if update is None or update.kind != "KV_CACHE_UPDATE":
                made = "nothing" if update is None else f"a {update.kind} layer"
                yield f"{present} is made by {made}, not by a KV-cache update: it is a copy, no alias of {past}"
                continue
            cache, _, rows = update.inputs[:3]
            if cache is None or cache.name != past:
                yield f"{present} updates {cache.name if cache else 'nothing'}, not {past}"
            if rows is None or "position_ids" not in set(network.before(rows.name)):
                yield f"{present}: its rows do not come from position_ids"
            for taker in network.takers.get(past, []):
                if taker is not update and taker.kind != "SHAPE":
                    yield f"{past} is also read by {taker.name or taker.kind}, which would see it before or after the update"


def check_fused(network: Network, variant: Variant) -> Iterator[str]:
    """One fused attention a layer, straight from the cache: all heads, a mask made from the positions, no causal kind."""
    config, found = variant.config, network.of("ATTENTION_INPUT")
    by_layer: dict[str, list[Layer]] = {}
    for attention in found:
        key = _cache_source(network, attention.inputs[1])
        by_layer.setdefault(key, []).append(attention)
    for layer, kv_heads in enumerate(config.kv_heads):
        key, value = contract.present_names(layer)
        here = by_layer.pop(key, [])
        if len(here) != 1:
            yield f"layer {layer} has {len(here)} fused attention layers over {key}, planned 1"
            continue
        yield from (f"layer {layer}: {reason}" for reason in _fused(network, here[0], value, config.num_heads, kv_heads))
    for source, others in by_layer.items():
        yield f"attention {others[0].details['name']} reads {source}, which is no present key"


def _fused(network: Network, attention: Layer, present_value: str, heads: int, kv_heads: int) -> Iterator[str]:
    details = attention.details
    query, key, value = attention.inputs[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    if details["causal"] != "NONE":
        yield f"its attention is causal {details['causal']}, planned NONE: wrong for decoding"
    if details["mask"] is None:
        yield "its attention has no mask"
    elif "position_ids" not in set(network.before(details["mask"].name)):
        yield "its mask does not come from position_ids"
    if details["lengths"]:
        yield f"its attention has {' and '.join(details['lengths'])}, planned none"
    if details["norm"] != "SOFTMAX":
        yield f"its attention normalises by {details['norm']}, planned SOFTMAX"
    if details["decomposable"]:
        yield "its attention may be decomposed, planned fused"
    if (source := _cache_source(network, value)) != present_value:
        yield f"its attention reads the values {source}, planned {present_value}"
    found, planned = (query.shape[1], key.shape[1], value.shape[1]), (heads, kv_heads, kv_heads)
    if found != planned:
        yield f"its attention has {list(found)} query, key and value heads, planned {list(planned)}"


def _cache_source(network: Network, given: Tensor | None) -> str:
    """The tensor that `given` is, but for a factor and zeros: the parser puts the square root of the scale on Q and on K, and
    heads.py zeros beside the smaller heads of GLU attention."""
    if given is None:
        return "nothing"
    layer = network.producer.get(given.name)
    if layer is not None and layer.kind == "SLICE" and layer.details["mode"] == "FILL":
        source = layer.inputs[0]
        assert source is not None
        wider = source.shape[:3] == given.shape[:3] and source.shape[3] < given.shape[3]
        return _cache_source(network, source) if wider else given.name
    if layer is not None and layer.kind == "ELEMENTWISE" and layer.details["op"] == "PROD":
        x, factor = layer.inputs[:2]
        if x is not None and factor is not None and network.is_scalar_constant(factor.name):
            return _cache_source(network, x)
    return given.name


def check_grouped(network: Network, variant: Variant) -> Iterator[str]:
    """Two products a layer over the G heads of the cache, which are not repeated, and a softmax of masked scores between."""
    if fused := network.of("ATTENTION_INPUT"):
        yield f"there are {len(fused)} fused attention layers, planned none in pattern grouped"
    config = variant.config
    for layer, kv_heads in enumerate(config.kv_heads):
        key, value = contract.present_names(layer)
        scores, output = _product(network, key), _product(network, value)
        if scores is None or output is None:
            yield f"layer {layer}: {key if scores is None else value} does not go into a matrix product as it is"
            continue
        found = (scores.outputs[0].shape[1], output.outputs[0].shape[1])
        if found != (kv_heads, kv_heads):
            yield f"layer {layer} has products over {found[0]} key and {found[1]} value heads, planned {kv_heads}"
        apart = [taker.outputs[0].shape for taker in network.takers.get(output.outputs[0].name, [])]
        if not any(len(shape) == 4 and shape[1] == config.num_heads for shape in apart):
            yield f"layer {layer}: its output is not taken apart into {config.num_heads} query heads"
        softmax = _maker(network, output.inputs[0])
        if softmax is None or softmax.kind != "SOFTMAX":
            yield f"layer {layer}: its values are not weighted by a softmax"
        elif not _adds_mask(network, _maker(network, softmax.inputs[0]), scores.outputs[0].name):
            yield f"layer {layer} has no mask from position_ids on its scores"


def _product(network: Network, cache: str) -> Layer | None:
    """The matrix product that reads `cache`, itself or transposed."""
    for taker in network.takers.get(cache, []):
        if taker.kind == "SHUFFLE":
            return _product(network, taker.outputs[0].name)
        if taker.kind == "MATRIX_MULTIPLY":
            return taker
    return None


def _maker(network: Network, given: Tensor | None) -> Layer | None:
    """The layer that makes `given`, whatever reshaped it on the way."""
    layer = network.producer.get(given.name) if given is not None else None
    return _maker(network, layer.inputs[0]) if layer is not None and layer.kind == "SHUFFLE" else layer


def _adds_mask(network: Network, layer: Layer | None, scores: str) -> bool:
    if layer is None:
        return False
    names = [given.name for given in layer.inputs if given is not None]
    others = [name for name in names if name != scores]
    is_sum = layer.kind == "ELEMENTWISE" and layer.details["op"] == "SUM" and scores in names
    return is_sum and any("position_ids" in set(network.before(name)) for name in others)


def check_casts(network: Network, variant: Variant) -> Iterator[str]:
    """No cast of a cache or a weight, and every product in the variant's own dtype: no precision changes silently."""
    caches = {name for layer in range(variant.config.num_layers) for name in contract.present_names(layer)}
    caches |= {name for layer in range(variant.config.num_layers) for name in contract.past_names(layer)}
    for cast in network.of("CAST"):
        given = cast.inputs[0]
        assert given is not None
        maker = network.producer.get(given.name)
        if given.name in caches:
            yield f"cache {given.name} is cast to {cast.details['to']}"
        elif maker is not None and maker.kind in ("CONSTANT", "DEQUANTIZE") and _is_matrix(given):
            yield f"weight {maker.name} is cast from {given.dtype} to {cast.details['to']}"
    for product in network.of("MATRIX_MULTIPLY"):
        kinds = {given.dtype for given in product.inputs if given is not None}
        if kinds != {variant.dtype}:
            yield f"{product.name} multiplies {' by '.join(sorted(kinds))}, planned {variant.dtype}"


def check_quantised(network: Network, quantised: int) -> Iterator[str]:
    """As many dequantisations as weights were quantised, each into a product."""
    found = network.of("DEQUANTIZE")
    if len(found) != quantised:
        yield f"there are {len(found)} dequantised weights, planned {quantised}"
    for layer in found:
        kinds = {taker.kind for taker in network.takers.get(layer.outputs[0].name, [])}
        if kinds != {"MATRIX_MULTIPLY"}:
            yield f"dequantised weight {layer.name} goes into {', '.join(sorted(kinds)) or 'nothing'}, planned a product"


def _is_matrix(given: Tensor) -> bool:
    """Not a number, and not the vector that a shape or a norm's weight is."""
    return len(given.shape) > 1 and math.prod(given.shape) > 1
