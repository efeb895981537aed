"""ONNX → INetworkDefinition, and that network as plain data for verification."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.engines.tensorrt.api import Api, Messages, logger
from exporter.engines.tensorrt.weights import Source
from exporter.errors import EngineError, GraphError

DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}


@dataclass
class Parsed:
    """A parsed network and what must outlive it. `source` has to stay open until the engine is built."""

    api: Api
    messages: Messages
    log: Any
    builder: Any
    definition: Any  # INetworkDefinition
    parser: Any


def parse(api: Api, source: Source, messages: Messages) -> Parsed:
    """Raises EngineError where TensorRT cannot start, GraphError in one line where it does not take the graph."""
    trt, log = api.trt, logger(api.trt, messages)
    builder = trt.Builder(log)
    if not builder:
        raise EngineError(f"{trt.__name__} {api.version} has no builder here: {messages.reason()}")
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(kinds.STRONGLY_TYPED) if hasattr(kinds, "STRONGLY_TYPED") else 0
    definition = builder.create_network(flags)
    parser = trt.OnnxParser(definition, log)
    loaded = parser.load_model_proto(source.model.SerializeToString(), str(source.path))
    loaded = loaded and all(parser.load_initializer(name, *place) for name, place in source.places.items())
    if not loaded or not parser.parse_model_proto():
        raise GraphError(f"{api.trt.__name__} {api.version} does not take {source.path.name}: {_parse_errors(parser)}")
    return Parsed(api, messages, log, builder, definition, parser)


def _parse_errors(parser: Any) -> str:
    if parser.num_errors == 0:
        return "the parser gave no reason"
    error = parser.get_error(0)
    lines = [line for line in error.desc().splitlines() if line.strip() and "cudaError" not in line]
    return " ".join(f"node {error.node_name()}: {' '.join(lines)}".split())[:400]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network; −1 is an open dimension."""

    name: str
    dtype: str  # fp32, fp16, bf16, int64, …
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with its tensors. `kind` is TensorRT's LayerType in capitals; an input it does without is None."""

    kind: str
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    details: dict[str, Any]


class Network:
    """The layers of an INetworkDefinition, and who makes and who takes each tensor.

    `numbers` are the graph's constants of one number by name (see weights.py): TensorRT's Python tells none of bf16.
    """

    def __init__(self, trt: Any, definition: Any, numbers: Mapping[str, float]) -> None:
        self.numbers = numbers
        self.inputs = {t.name: t for t in (tensor(definition.get_input(i)) for i in range(definition.num_inputs))}
        self.outputs = {t.name: t for t in (tensor(definition.get_output(i)) for i in range(definition.num_outputs))}
        self.layers = [_layer(trt, definition.get_layer(index)) for index in range(definition.num_layers)]
        self.producer = {out.name: layer for layer in self.layers for out in layer.outputs}
        self.takers: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for given in layer.inputs:
                if given is not None:
                    self.takers.setdefault(given.name, []).append(layer)

    def of(self, kind: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == kind]

    def before(self, name: str, shapes: bool = True) -> Iterator[str]:
        """`name` and every tensor that it is made from; without `shapes`, not those of which only the shape is read."""
        seen, open_names = {name}, [name]
        while open_names:
            yield (current := open_names.pop())
            layer = self.producer.get(current)
            if layer is None or (layer.kind == "SHAPE" and not shapes):
                continue
            for given in layer.inputs:
                if given is not None and given.name not in seen:
                    seen.add(given.name)
                    open_names.append(given.name)

    def behind(self, name: str, shapes: bool = True) -> set[str]:
        """`before` and the names of the layers that make those: a weight's layer has the weight's name."""
        tensors = set(self.before(name, shapes))
        return tensors | {self.producer[tensor].name for tensor in tensors if tensor in self.producer}

    def scalar(self, name: str) -> float | None:
        """The one number that it is, whatever was cast or reshaped on the way; None where it is none."""
        makers = [layer for made in self.before(name) if (layer := self.producer.get(made)) is not None]
        values = [layer.details.get("value", self.numbers.get(layer.name)) for layer in makers]
        numbers = [value for value in values if value is not None]
        return numbers[0] if len(numbers) == 1 and self.is_scalar_constant(name) else None

    def is_scalar_constant(self, name: str) -> bool:
        """Whether it is one number, known at build time, whatever was cast or reshaped on the way."""
        makers = [self.producer.get(made) for made in self.before(name)]
        return all(layer is not None and all(math.prod(out.shape) == 1 for out in layer.outputs) for layer in makers)


def tensor(given: Any) -> Tensor:
    kind = given.dtype.name
    try:
        shape = tuple(given.shape)
    except ValueError:  # the rank is not known
        shape = ()
    return Tensor(given.name, DTYPES.get(kind, kind.lower()), shape)


def _layer(trt: Any, layer: Any) -> Layer:
    given = [layer.get_input(index) for index in range(layer.num_inputs)]
    outputs = tuple(tensor(layer.get_output(index)) for index in range(layer.num_outputs))
    kind = layer.type.name
    inputs = tuple(None if value is None else tensor(value) for value in given)
    return Layer(kind, layer.name, inputs, outputs, _details(trt, kind, layer))


def _details(trt: Any, kind: str, layer: Any) -> dict[str, Any]:
    """What only a layer's own class tells. `get_layer` gives the base class; its own is put on, as TensorRT's samples do."""
    if kind == "ATTENTION_INPUT":
        layer.__class__ = trt.IAttentionInputLayer
        attention = layer.attention
        causal = getattr(attention, "causal_kind", None)
        return {
            "name": attention.name,
            "causal": causal.name if causal is not None else "UPPER_LEFT" if attention.causal else "NONE",
            "mask": None if attention.mask is None else tensor(attention.mask),
            "norm": attention.norm_op.name,
            "decomposable": bool(attention.decomposable),
            "lengths": [n for n in ("query_lengths", "key_value_lengths") if getattr(attention, n, None) is not None],
        }
    if kind == "ELEMENTWISE":
        layer.__class__ = trt.IElementWiseLayer
        return {"op": layer.op.name}
    if kind == "CONSTANT" and math.prod(layer.get_output(0).shape) == 1 and layer.get_output(0).dtype == trt.float32:
        layer.__class__ = trt.IConstantLayer
        return {"value": float(layer.weights.reshape(-1)[0])}
    if kind == "SLICE":
        layer.__class__ = trt.ISliceLayer
        return {"mode": layer.mode.name}
    if kind == "SHUFFLE":
        layer.__class__ = trt.IShuffleLayer
        given, made = (len(value.shape) for value in (layer.get_input(0), layer.get_output(0)))
        first, second = layer.first_transpose, layer.second_transpose
        return {"turns": [tuple(first[axis] for axis in range(given)), tuple(second[axis] for axis in range(made))]}
    if kind == "ACTIVATION":
        layer.__class__ = trt.IActivationLayer
        return {"activation": layer.type.name}
    if kind == "GATHER":
        layer.__class__ = trt.IGatherLayer
        return {"axis": layer.axis}
    if kind == "SOFTMAX":
        layer.__class__ = trt.ISoftMaxLayer
        return {"axes": [axis for axis in range(len(layer.get_output(0).shape)) if layer.axes >> axis & 1]}
    if kind == "CAST":
        layer.__class__ = trt.ICastLayer
        return {"to": DTYPES.get(layer.to_type.name, layer.to_type.name.lower())}
    return {}
