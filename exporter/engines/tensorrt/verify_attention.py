"""Is each attention of a parsed network what was planned: over its own keys and values, masked, scaled, with all its heads?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from exporter.engines.tensorrt.lineage import factor, lineage, maker, padded, scaled, unmixed, weight_of
from exporter.engines.tensorrt.network import Layer, Network, Tensor
from exporter.engines.tensorrt.parts import Attention, Part
from exporter.engines.tensorrt.verify_mask import mask_flaws

ROUNDING = {"fp32": 2**-24, "fp16": 2**-11, "bf16": 2**-8}  # half of the last place: what storing the scale may change


def check_fused(network: Network, part: Part) -> Iterator[str]:
    """One attention layer for each that is planned, straight from what it reads: all heads, its mask, no causal kind."""
    by_key: dict[str, list[Layer]] = {}
    for layer in network.of("ATTENTION_INPUT"):
        by_key.setdefault(source_of(network, layer.inputs[1]), []).append(layer)
    for plan in part.attention:
        here = by_key.pop(plan.key, [])
        if len(here) != 1:
            yield f"{plan.name} has {len(here)} fused attention layers over {plan.key}, planned 1"
            continue
        yield from (f"{plan.name}: {reason}" for reason in _fused(network, here[0], plan, part.variant.config.num_heads))
    for source, others in by_key.items():
        yield f"attention {others[0].details['name']} reads {source}, which is no planned key"


def _fused(network: Network, attention: Layer, plan: Attention, heads: int) -> Iterator[str]:
    details = attention.details
    query, key, value = attention.inputs[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    if details["causal"] != "NONE":
        yield f"its attention is causal {details['causal']}, planned NONE: wrong for decoding"
    mask = details["mask"]
    if mask is None:
        yield "its attention has no mask"
    else:
        yield from mask_flaws(network, mask, plan)
    if details["lengths"]:
        yield f"its attention has {' and '.join(details['lengths'])}, planned none"
    if details["norm"] != "SOFTMAX":
        yield f"its attention normalises by {details['norm']}, planned SOFTMAX"
    if details["decomposable"] != plan.decomposable:
        told = "may be decomposed, planned fused" if details["decomposable"] else "may not be decomposed, planned that it may"
        yield f"its attention {told}"
    yield from _query_flaws(network, query, plan)
    scale = factor(network, query) * factor(network, key)
    if not math.isclose(scale, plan.scale, rel_tol=1e-4):
        yield f"its scores are scaled by {scale:.6g}, planned {plan.scale:.6g}"
    yield from (
        f"its {what} have heads and tokens in another order"
        for what, read in (("keys", key), ("values", value))
        if not unmixed(network, read)
    )
    if (source := source_of(network, value)) != plan.value:
        yield f"its attention reads the values {source}, planned {plan.value}"
    elif (times := factor(network, value)) != 1:
        yield f"its values are multiplied by {times:.6g}"
    found, planned = (query.shape[1], key.shape[1], value.shape[1]), (heads, plan.kv_heads, plan.kv_heads)
    if found != planned:
        yield f"its attention has {list(found)} query, key and value heads, planned {list(planned)}"


def source_of(network: Network, given: Tensor | None) -> str:
    """The tensor that `given` is, or the weight of the linear layer that it is the output of, but for its shape, a factor and
    zeros: the parser puts the square root of the scale on Q and on K, and heads.py zeros beside the smaller heads of GLU
    attention."""
    if given is None:
        return "nothing"
    layer = network.producer.get(given.name)
    if layer is not None and (narrower := padded(layer)) is not None:
        return source_of(network, narrower)
    if layer is not None and (times := scaled(network, layer)) is not None:
        return source_of(network, times[0])
    made_by = maker(network, given)
    weight = weight_of(network, made_by) if made_by is not None else None
    return given.name if weight is None else weight


def _query_flaws(network: Network, query: Tensor, plan: Attention) -> Iterator[str]:
    found = lineage(network, query)
    if found.weight != plan.query:
        yield f"its queries are made by {found.weight or found.wrong}, planned {plan.query}"
    elif found.rotated != plan.rotated:
        yield f"its queries are {'' if found.rotated else 'not '}rotated by their positions"


def check_grouped(network: Network, part: Part) -> Iterator[str]:
    """Two products a layer over the G heads of what it reads, which are not repeated; between them a softmax, over the rows, of
    scaled and masked scores."""
    if fused := network.of("ATTENTION_INPUT"):
        yield f"there are {len(fused)} fused attention layers, planned none in pattern grouped"
    made = {weight_of(network, layer): layer.outputs[0].name for layer in reversed(network.of("MATRIX_MULTIPLY"))}
    for plan in part.attention:
        scores, output = (_product(network, made.get(source, source)) for source in (plan.key, plan.value))
        if scores is None or output is None:
            yield f"{plan.name}: {plan.key if scores is None else plan.value} does not go into a matrix product as it is"
            continue
        found = (scores.outputs[0].shape[1], output.outputs[0].shape[1])
        if found != (plan.kv_heads, plan.kv_heads):
            yield f"{plan.name} has products over {found[0]} key and {found[1]} value heads, planned {plan.kv_heads}"
        heads = part.variant.config.num_heads
        apart = [taker.outputs[0].shape for taker in network.takers.get(output.outputs[0].name, [])]
        if not any(len(shape) == 4 and shape[1] == heads for shape in apart):
            yield f"{plan.name}: its output is not taken apart into {heads} query heads"
        if (rows := scores.inputs[0]) is not None:
            yield from (f"{plan.name}: {flaw}" for flaw in _query_flaws(network, rows, plan))
        scale = factor(network, scores.inputs[0])
        if not math.isclose(scale, plan.scale, rel_tol=ROUNDING[part.variant.dtype]):
            yield f"{plan.name}: its scores are scaled by {scale:.6g}, planned {plan.scale:.6g}"
        softmax = maker(network, output.inputs[0])
        if softmax is None or softmax.kind != "SOFTMAX":
            yield f"{plan.name}: its values are not weighted by a softmax"
        elif softmax.details["axes"] != [len(softmax.outputs[0].shape) - 1]:
            yield f"{plan.name}: its softmax is over axes {softmax.details['axes']}, planned the cache rows, which are the last"
        else:
            mask = _added(network, maker(network, softmax.inputs[0]), scores.outputs[0].name)
            if mask is None:
                yield f"{plan.name} has no mask from {' and '.join(plan.mask)} on its scores"
            else:
                yield from (f"{plan.name}: {flaw}" for flaw in mask_flaws(network, mask, plan))


def _product(network: Network, name: str) -> Layer | None:
    """The matrix product of attention that reads `name`, itself or with its heads apart or transposed."""
    for taker in network.takers.get(name, []):
        if taker.kind == "SHUFFLE":
            if (found := _product(network, taker.outputs[0].name)) is not None:
                return found
        elif taker.kind == "MATRIX_MULTIPLY":
            return taker
    return None


def _added(network: Network, layer: Layer | None, scores: str) -> Tensor | None:
    """What `layer` adds to `scores`."""
    names = [given.name for given in layer.inputs if given is not None] if layer is not None else []
    if layer is None or layer.kind != "ELEMENTWISE" or layer.details["op"] != "SUM" or scores not in names:
        return None
    return next((given for given in layer.inputs if given is not None and given.name != scores), None)
