"""Is a parsed network what was planned? Read from TensorRT's own network, not from the ONNX it came from.

The parser drops or changes what it has no layer for, often with a warning only: `is_causal` becomes upper-left causality, which
is wrong for decoding; `nonpad_kv_seqlen` is left out; a cache update of another form becomes a copy. Each check below, and in
verify_attention.py, names what deviates; a network with a deviation is not built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from exporter import contract
from exporter.engines.tensorrt.lineage import factor, lineage, maker, uncast, unmixed, weight_of
from exporter.engines.tensorrt.network import Layer, Network, Tensor
from exporter.engines.tensorrt.parts import Part, shape
from exporter.engines.tensorrt.record import Verified
from exporter.engines.tensorrt.verify_attention import check_fused, check_grouped
from exporter.engines.tensorrt.verify_mask import written_rows
from exporter.engines.tensorrt.weights import Source
from exporter.errors import GraphError

CHANGES = ("is_causal", "softcap", "qk_matmul_output_mode")  # attributes of Attention that are 0 in all of headpool's graphs


def verify(network: Network, part: Part, sizes: Mapping[str, int], quantised: int = 0) -> Verified:
    """Facts about the network, for engine.json; `quantised` is how many weights are dequantised in it.

    Raises GraphError naming the first deviation and how many there are.
    """
    deviations = [
        *check_bindings(network, part, sizes),
        *check_caches(network, part),
        *check_made(network, part),
        *check_casts(network, part),
        *(check_fused(network, part) if part.variant.pattern == "attention" else check_grouped(network, part)),
        *check_quantised(network, quantised),
        *check_used(network),  # last: where an input is not used, another check often says why
    ]
    if deviations:
        more = f" (and {len(deviations) - 1} more deviations)" if len(deviations) > 1 else ""
        raise GraphError(
            f"{part.graph}, as TensorRT parsed it, is not what variant {part.variant.name} plans: {deviations[0]}{more}"
        )
    return facts(network, part)


def facts(network: Network, part: Part) -> Verified:
    heads = [f"{part.variant.config.num_heads}:{attention.kv_heads}" for attention in part.attention]
    found = [layer.details for layer in network.of("ATTENTION_INPUT")]
    return Verified(
        layers=len(network.layers),
        fused_attention=sum(not details["decomposable"] for details in found),
        decomposable_attention=sum(details["decomposable"] for details in found),
        cache_updates=len(network.of("KV_CACHE_UPDATE")),
        dequantised_weights=len(network.of("DEQUANTIZE")),
        heads=heads[0] if len(set(heads)) == 1 else tuple(heads),
        causal=tuple(sorted({details["causal"] for details in found})),
    )


def check_bindings(network: Network, part: Part, sizes: Mapping[str, int]) -> Iterator[str]:
    """Inputs and outputs have the contract's names, dtypes and shapes, and no others."""
    for what, wanted, found in (("input", part.inputs, network.inputs), ("output", part.outputs, network.outputs)):
        for binding in wanted:
            plan = Tensor(binding.name, binding.dtype, shape(binding, sizes))
            there = found.get(binding.name)
            if there is None or there.dtype != plan.dtype or not _same_shape(there.shape, plan.shape, binding.role):
                have = "is missing" if there is None else f"is {there.dtype} {list(there.shape)}"
                yield f"{what} {binding.name} {have}, planned {plan.dtype} {list(plan.shape)}"
        for name in set(found) - {binding.name for binding in wanted}:
            yield f"{what} {name} is not in the contract"


def _same_shape(found: tuple[int, ...], planned: tuple[int, ...], role: contract.Role) -> bool:
    """What comes out of a Reshape may leave V or d open, which the builder finds: logits and hidden states."""
    same = [f == p or (f == -1 and role in ("logits", "hidden")) for f, p in zip(found, planned, strict=False)]
    return len(found) == len(planned) and all(same)


def check_used(network: Network) -> Iterator[str]:
    """Every input is read, and every layer's result is: what the parser ignores stands in the network with no reader."""
    for name in network.inputs:
        if all(taker.kind == "SHAPE" for taker in network.takers.get(name, [])):
            yield f"input {name} is not used{', but for its shape' * (name in network.takers)}"
    for layer in network.layers:
        if not any(out.name in network.takers or out.name in network.outputs for out in layer.outputs):
            yield f"the result of {layer.name or layer.kind} is not used: an input of a node was ignored"


def check_caches(network: Network, part: Part) -> Iterator[str]:
    """Every cache tensor is written in place: an IKVCacheUpdateLayer whose input is the past and whose output the present, and
    what it writes its own layer's keys or values."""
    for past, present, weight in part.caches:
        update = network.producer.get(present)
        if update is None or update.kind != "KV_CACHE_UPDATE":
            made = "nothing" if update is None else f"a {update.kind} layer"
            yield f"{present} is made by {made}, not by a KV-cache update: it is a copy, no alias of {past}"
            continue
        cache, written, rows = update.inputs[:3]
        if cache is None or cache.name != past:
            yield f"{present} updates {cache.name if cache else 'nothing'}, not {past}"
        found = lineage(network, written)
        if found.weight != weight:
            yield f"what is written into {present} is made by {found.weight or found.wrong}, planned {weight}"
        elif (times := factor(network, written)) != 1:
            yield f"what is written into {present} is multiplied by {times:.6g}"
        elif found.rotated != (part.rotated and ".k_proj." in weight):
            yield f"what is written into {present} is {'' if found.rotated else 'not '}rotated by its positions"
        if not written_rows(network, rows):
            yield f"{present}: its rows do not come from position_ids, the first of each sequence"
        for taker in network.takers.get(past, []):
            if taker is not update and taker.kind != "SHAPE":
                yield f"{past} is also read by {taker.name or taker.kind}, which would see it before or after the update"


def check_made(network: Network, part: Part) -> Iterator[str]:
    """What cross-attention reads is made by each layer's own weights from what the encoder's last norm gives."""
    for name, weight in part.made:
        product = maker(network, network.outputs.get(name))
        if product is None or (source := weight_of(network, product)) != weight:
            yield f"{name} is made by {source if product is not None else 'nothing'}, planned {weight}"
        elif not unmixed(network, network.outputs[name]):
            yield f"{name} has heads and tokens in another order"
        elif not _normed_last(network, product):
            yield f"{name} does not come from the encoder's last norm"


def _normed_last(network: Network, product: Layer) -> bool:
    """apart.py gives some products a norm of their own, whose weight has another ending."""
    x = product.inputs[0]
    return x is not None and any(name.startswith("encoder.norm.weight") for name in network.behind(x.name, shapes=False))


def check_casts(network: Network, part: Part) -> Iterator[str]:
    """No cast of a cache or a weight, and every product in the variant's own dtype: no precision changes silently."""
    caches = {binding.name for binding in (*part.inputs, *part.outputs) if binding.role == "cache"}
    dtype = part.variant.dtype
    for cast in network.of("CAST"):
        given = cast.inputs[0]
        assert given is not None
        held = network.producer.get(given.name)
        if given.name in caches:
            yield f"cache {given.name} is cast to {cast.details['to']}"
        elif held is not None and held.kind in ("CONSTANT", "DEQUANTIZE") and _is_matrix(given):
            yield f"weight {held.name} is cast to {cast.details['to']}"
    for product in network.of("MATRIX_MULTIPLY"):
        last, held = maker(network, product.inputs[1]), uncast(network, product.inputs[1])
        if last is not held and held is not None and held.kind in ("CONSTANT", "DEQUANTIZE"):
            yield f"weight {held.name} is cast on its way to {product.name}"
        kinds = {given.dtype for given in product.inputs if given is not None}
        if kinds != {dtype}:
            yield f"{product.name} multiplies {' by '.join(sorted(kinds))}, planned {dtype}"


def check_quantised(network: Network, quantised: int) -> Iterator[str]:
    """As many dequantisations as weights were quantised, each into a product."""
    found = network.of("DEQUANTIZE")
    if len(found) != quantised:
        yield f"there are {len(found)} dequantised weights, planned {quantised}"
    for layer in found:
        kinds = {taker.kind for taker in network.takers.get(layer.outputs[0].name, [])}
        if kinds != {"MATRIX_MULTIPLY"}:
            yield f"dequantised weight {layer.name} goes into {', '.join(sorted(kinds)) or 'nothing'}, planned a product"


def check_nodes(source: Source, part: Part) -> None:
    """Refuse what the parser leaves out of a network without a trace, which only the graph still tells.

    An Attention node's further inputs (its own past, nonpad_kv_seqlen) and outputs, and the attributes that change what is
    computed, are none of headpool's. Where they also leave a trace in the network, `verify` has named that. Raises GraphError.
    """
    for node in source.model.graph.node:
        if node.op_type != "Attention":
            continue
        given = [name for name in node.input[4:] if name]
        changed = [a.name for a in node.attribute if a.name in CHANGES and (a.i or a.f)]
        for what in (*given, *(name for name in node.output[1:] if name), *changed):
            raise GraphError(
                f"{part.graph}, as it is given to TensorRT, is not what variant {part.variant.name} plans: attention "
                f"{node.name} has {what}, which the parser may ignore"
            )


def _is_matrix(given: Tensor) -> bool:
    """Not a number, and not the vector that a shape or a norm's weight is."""
    return len(given.shape) > 1 and math.prod(given.shape) > 1
