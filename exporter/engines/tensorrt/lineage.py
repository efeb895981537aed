"""How a tensor of a parsed network came about: back to the one linear layer it is the output of, and what stands on the way.

Only what headpool's own graphs have may: heads split apart, positions rotated in, the norm of a head, a bias, the gate of a GLU
value, zeros beside smaller heads, one number as a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from exporter.engines.tensorrt.network import Layer, Network, Tensor
from exporter.engines.tensorrt.quantize import DEQUANTISED

SHAPED = ("SHUFFLE", "UNSQUEEZE", "SQUEEZE")  # layers that change nothing but the shape
APART = (0, 2, 1, 3)  # heads before tokens


@dataclass(frozen=True)
class Lineage:
    """`weight` is that of the linear layer, None where something else is on the way: `wrong`, for a person."""

    weight: str | None
    wrong: str = ""
    rotated: bool = False  # by positions


def maker(network: Network, given: Tensor | None) -> Layer | None:
    """The layer that makes `given`, whatever reshaped it on the way."""
    layer = network.producer.get(given.name) if given is not None else None
    return maker(network, layer.inputs[0]) if layer is not None and layer.kind in SHAPED else layer


def uncast(network: Network, given: Tensor | None) -> Layer | None:
    """The layer that makes `given`, whatever reshaped or cast it on the way."""
    layer = maker(network, given)
    return uncast(network, layer.inputs[0]) if layer is not None and layer.kind == "CAST" else layer


def weight_of(network: Network, layer: Layer) -> str | None:
    """The weight that a linear layer multiplies by, dequantised or as it is."""
    other = layer.inputs[1] if layer.kind == "MATRIX_MULTIPLY" else None
    held = network.producer.get(other.name) if other is not None else None
    return held.name.removesuffix(DEQUANTISED) if held is not None and held.kind in ("CONSTANT", "DEQUANTIZE") else None


def scaled(network: Network, layer: Layer) -> tuple[Tensor, Tensor] | None:
    """What a layer multiplies by one number known at build time, and that number."""
    if layer.kind != "ELEMENTWISE" or layer.details["op"] != "PROD":
        return None
    x, factor = layer.inputs[:2]
    return (x, factor) if x is not None and factor is not None and network.is_scalar_constant(factor.name) else None


def factor(network: Network, given: Tensor | None) -> float:
    """The product of all numbers on the way to `given`; NaN where one cannot be read."""
    layer = network.producer.get(given.name) if given is not None else None
    if layer is None:
        return 1.0
    if (times := scaled(network, layer)) is not None:
        value = network.scalar(times[1].name)
        return math.nan if value is None else value * factor(network, times[0])
    return factor(network, layer.inputs[0]) if layer.kind in (*SHAPED, "SLICE", "ROTARY_EMBEDDING") else 1.0


def lineage(network: Network, given: Tensor | None) -> Lineage:
    """Of `given`; factors are left out (see `factor`)."""
    layer = network.producer.get(given.name) if given is not None else None
    if layer is None:
        return Lineage(None, f"the input {given.name}" if given is not None else "nothing")
    if _mixed(layer):
        return Lineage(None, f"heads and tokens in another order, of {layer.name}")
    if layer.kind in SHAPED:
        return lineage(network, layer.inputs[0])
    if layer.kind == "MATRIX_MULTIPLY":
        return Lineage(weight_of(network, layer), "a product of two tensors")
    if layer.kind == "ROTARY_EMBEDDING":
        return _rotated(network, layer)
    if (narrower := padded(layer)) is not None:
        return lineage(network, narrower)
    if layer.kind == "CAST" and (normed := _normed(network, maker(network, layer.inputs[0]))) is not None:  # fp32 until then
        return normed
    if layer.kind == "ELEMENTWISE":
        if (times := scaled(network, layer)) is not None:
            return lineage(network, times[0])
        for inner in (_biased(network, layer), _normed(network, layer), _gated(network, layer)):
            if inner is not None:
                return inner
    return Lineage(None, f"the {layer.kind} layer {layer.name}")


def padded(layer: Layer) -> Tensor | None:
    """What a layer puts zeros beside, for heads of one size (see heads.py)."""
    whole = layer.inputs[0] if layer.kind == "SLICE" and layer.details["mode"] == "FILL" else None
    if whole is None or whole.shape[:-1] != layer.outputs[0].shape[:-1] or whole.shape[-1] >= layer.outputs[0].shape[-1]:
        return None
    return whole


def unmixed(network: Network, given: Tensor | None) -> bool:
    """Whether nothing between `given` and the layer that makes it gives tokens' numbers to other tokens or heads."""
    layer = network.producer.get(given.name) if given is not None else None
    if layer is None:
        return True
    if layer.kind in SHAPED or scaled(network, layer) is not None or padded(layer) is not None:
        return not _mixed(layer) and unmixed(network, layer.inputs[0])
    return True


def _mixed(layer: Layer) -> bool:
    """Whether a layer gives tokens' numbers to other tokens or heads: [B,T,H,D] has to be transposed to [B,H,T,D]."""
    if layer.kind != "SHUFFLE":
        return False
    turns = [turn for turn in layer.details["turns"] if turn != tuple(range(len(turn)))]
    before, after = (
        value is not None and len(value.shape) == 4 and value.shape[2] == -1 for value in (layer.inputs[0], layer.outputs[0])
    )
    return any(turn != APART for turn in turns) or (after and not before and not turns)


def _rotated(network: Network, layer: Layer) -> Lineage:
    inner = lineage(network, layer.inputs[0])
    for angle in layer.inputs[1:3]:
        if angle is None or "position_ids" not in set(network.before(angle.name, shapes=False)):
            return Lineage(None, f"angles that do not come from position_ids, in {layer.name}")
    return Lineage(inner.weight, inner.wrong, rotated=True)


def _biased(network: Network, layer: Layer) -> Lineage | None:
    """x · W + b, each of the same linear layer."""
    product, bias = (maker(network, given) for given in layer.inputs[:2])
    if layer.details["op"] != "SUM" or product is None or bias is None or bias.kind != "CONSTANT":
        return None
    weight = weight_of(network, product)
    same = weight is not None and bias.name == f"{weight.removesuffix('.weight')}.bias"
    return Lineage(weight) if same else Lineage(None, f"{weight} and {bias.name}")


def _normed(network: Network, layer: Layer | None) -> Lineage | None:
    """RMSNorm of each head: x / √(mean x² + ε), in fp32, times a weight of that name."""
    if layer is None or layer.kind != "ELEMENTWISE" or layer.details["op"] != "PROD":
        return None
    x, weight = layer.inputs[:2]
    if x is None or weight is None:
        return None
    held = network.behind(weight.name)
    if not any(name.endswith("_norm.weight") for name in held) or held & network.inputs.keys():
        return None
    divided = uncast(network, x)
    if divided is None or divided.kind != "ELEMENTWISE" or divided.details["op"] != "DIV":
        return None
    given = divided.inputs[0]
    wide = network.producer.get(given.name) if given is not None else None
    return lineage(network, wide.inputs[0] if wide is not None and wide.kind == "CAST" else given)


def _gated(network: Network, layer: Layer) -> Lineage | None:
    """The value of GLU attention: v · SiLU(g), with g · σ(g) for SiLU(g)."""
    silu = maker(network, layer.inputs[1])
    if layer.details["op"] != "PROD" or silu is None or silu.kind != "ELEMENTWISE" or silu.details["op"] != "PROD":
        return None
    gate, sigma = silu.inputs[0], maker(network, silu.inputs[1])
    value, its = lineage(network, layer.inputs[0]), lineage(network, gate)
    named = value.weight is not None and its.weight == value.weight.replace(".v_proj.", ".v_gate_proj.") != value.weight
    if sigma is None or sigma.details.get("activation") != "SIGMOID":
        return None
    same = maker(network, sigma.inputs[0]) is maker(network, gate)
    plain = factor(network, layer.inputs[0]) == factor(network, gate) == 1
    return Lineage(value.weight) if named and same and plain else None
