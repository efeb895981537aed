"""The canonical graph: the parts of the decoder traced once each, the layer stamped N times.

Tracing runs under fake tensors, so no weight is ever materialised, and its cost does not grow with depth: one trace for the
prologue, one for the epilogue and one for each *distinct* layer (layers differ only in their KV heads). The result names
every weight by its canonical parameter name and holds none of their bytes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops.core import aten_view
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter import contract
from exporter.checkpoint.expected import EMBEDDING, HEAD
from exporter.config import CacheForm, ModelConfig
from exporter.models.decoder import Epilogue, Layer, Prologue
from exporter.models.grouped_attention import onnx_translation
from exporter.models.rope import frequencies
from exporter.weights import TORCH_DTYPES
from graphs import canonical
from graphs.stamp import Stamper

OPSET = 24
IR_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "int64": ir.DataType.INT64}
Spec = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]  # shape, dtype, dynamic dimensions


def canonical_graph(config: ModelConfig, cache: CacheForm, dtype: str, logits: contract.Logits = "last") -> ir.Model:
    """The whole decoder over `headpool::GroupedAttention`, one node a layer, with the bindings of exporter/contract.py.

    Weights are initialisers with type and shape and no value; their names are the canonical parameter names.
    """
    inputs = {binding.name: graph_value(binding) for binding in contract.inputs(config, cache, dtype)}
    stamper = Stamper(inputs.values(), opset=OPSET, domains={canonical.DOMAIN: canonical.VERSION})
    ids, positions, mask = inputs["input_ids"], inputs["position_ids"], inputs.get("attention_mask")
    ends = _ends(config)

    x, *angles = stamper.stamp(_prologue(ends, dtype), "model", [ids, positions])
    present: list[ir.Value] = []
    for index, kv_heads in enumerate(config.kv_heads):
        layer = _layer(_one_layer(config, kv_heads), cache, dtype)
        past = [inputs[name] for name in contract.past_names(index)]
        shared = [positions, *([mask] if mask is not None else [])]
        x, *caches = stamper.stamp(layer, f"model.layers.{index}", [x, *angles, *shared, *past])
        present += caches
    weight = stamper.initializer(EMBEDDING if config.tied else HEAD, IR_DTYPES[dtype], (config.vocab_size, config.hidden_size))
    (scores,) = stamper.stamp(epilogue(ends, dtype, logits), "model", [x, positions, weight])
    if config.rope.kind != "none":
        stamper.initializers["model.rotary.inv_freq"].const_value = ir.tensor(frequencies(config)[0].numpy())
    return finish(stamper, [scores, *present], contract.outputs(config, cache, dtype, logits), config.family)


def graph_value(binding: contract.Binding) -> ir.Value:
    return ir.Value(name=binding.name, shape=ir.Shape(binding.shape), type=ir.TensorType(IR_DTYPES[binding.dtype]))


def finish(stamper: Stamper, outputs: Sequence[ir.Value], bindings: Sequence[contract.Binding], name: str) -> ir.Model:
    """The graph `name`, its outputs named and shaped as `bindings` say."""
    for value, binding in zip(outputs, bindings, strict=True):
        value.name = binding.name
        value.shape, value.dtype = ir.Shape(binding.shape), IR_DTYPES[binding.dtype]
    return stamper.finish(outputs, name=name)


# Sizes that stand for dynamic dimensions; distinct and not 0 or 1, which torch.export would bake in.
B, T, P = 2, 3, 17


def _one_layer(config: ModelConfig, kv_heads: int) -> ModelConfig:
    """The config of a part: equal for all models and group counts that share it, so that it is traced once a process."""
    return dataclasses.replace(config, num_layers=1, kv_heads=(kv_heads,))


def _ends(config: ModelConfig) -> ModelConfig:
    """The config of prologue and epilogue: equal for all models that only their layers tell apart."""
    return dataclasses.replace(
        _one_layer(config, config.num_heads),
        intermediate_size=1,
        ffn="relu",
        gelu_tanh=False,
        qkv_bias=False,
        o_bias=False,
        ffn_bias=False,
        qk_norm=False,
        glu_value_dim=None,
        tied=True,
        family="",
        bos_token_id=None,
        eos_token_ids=(),
    )


@functools.lru_cache(maxsize=64)
def _prologue(config: ModelConfig, dtype: str) -> ir.Model:
    ids = ((B, T), torch.long, (0, 1))
    return trace_part(lambda: Prologue(config, TORCH_DTYPES[dtype]), dtype, [ids, ids])


@functools.lru_cache(maxsize=64)
def _layer(config: ModelConfig, cache: CacheForm, dtype: str) -> ir.Model:
    c, kind, kv_heads = config, TORCH_DTYPES[dtype], config.kv_heads[0]
    angle = ((B, T, c.rotary_dim // 2), kind, (0, 1)) if c.rope.kind != "none" else None
    mask = ((B, P + T), torch.long, (0, 1)) if cache == "concat" else None
    caches = [((B, kv_heads, P, size), kind, (0, 2)) for size in (c.head_dim, c.value_dim)]
    x = ((B * T, c.hidden_size), kind, (0,))
    positions = ((B, T), torch.long, (0, 1))
    return trace_part(lambda: Layer(c, kv_heads), dtype, [x, angle, angle, positions, mask, *caches])


@functools.lru_cache(maxsize=64)
def epilogue(config: ModelConfig, dtype: str, logits: contract.Logits, scale: float = 1.0) -> ir.Model:
    kind = TORCH_DTYPES[dtype]
    x = ((B * T, config.hidden_size), kind, (0,))
    weight = ((config.vocab_size, config.hidden_size), kind, ())
    part = [x, ((B, T), torch.long, (0, 1)), weight]
    return trace_part(lambda: Epilogue(config, logits == "last", scale), dtype, part)


def trace_part(build: Callable[[], nn.Module], dtype: str, inputs: Sequence[Spec | None]) -> ir.Model:
    """torch.export → torch.onnx.export of one part, under fake tensors. None stands for an input the part does without."""
    with FakeTensorMode(), quiet(), swift():
        module = _build(build, TORCH_DTYPES[dtype])
        args = tuple(None if spec is None else torch.zeros(spec[0], dtype=spec[1]) for spec in inputs)
        shapes = tuple(None if spec is None else dict.fromkeys(spec[2], torch.export.Dim.DYNAMIC) for spec in inputs)
        program = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            custom_translation_table={**onnx_translation(), **_without_decomposing()},
            verbose=False,
        )
    assert onnx_program is not None
    return onnx_program.model


def _build(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # Module.to does not work on fake parameters
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def swift() -> Iterator[None]:
    """Nobody looks for garbage among the objects that a trace makes by the million; the parts share what torch.onnx.export
    reads of torchlib; and what torchlib has functions for is not traced again to be decomposed."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _torchlib_read_once(), _decomposed_where_needed():
            yield
    finally:
        if collecting:
            gc.enable()


def _torchlib_read_once() -> contextlib.AbstractContextManager[object]:
    """torch.onnx.export reads all of torchlib anew in each call. That it does so by this method is its own affair: where
    another torch does not, nothing is shared and nothing is lost."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        return mock.patch.object(ONNXRegistry, "from_torchlib", _shared(ONNXRegistry.from_torchlib))
    except (ImportError, AttributeError):
        return contextlib.nullcontext()


@functools.cache
def _shared(read: Callable[..., Any]) -> Callable[..., Any]:
    """`read` with its results kept; each caller's is its own to put custom operators into."""
    kept = functools.cache(read)

    def from_torchlib(*_: object, **options: Any) -> Any:  # called on an instance, or on the class
        registry = copy.copy(kept(**options))
        registry.functions = {target: list(functions) for target, functions in registry.functions.items()}
        return registry

    return from_torchlib


def _decomposed_where_needed() -> contextlib.AbstractContextManager[object]:
    """torch.onnx.export traces each part once more, to decompose what has no function in torchlib, also where all has one:
    a third of the time it takes. As above, this is its own affair."""
    try:
        from torch.onnx._internal.exporter import _fx_passes

        return mock.patch.object(_fx_passes, "decompose_with_registry", _sparing(_fx_passes.decompose_with_registry))
    except (ImportError, AttributeError):
        return contextlib.nullcontext()


def _sparing(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """`decompose`, left out where all operators of a program have a function, are ONNX's own or only assert something."""

    def decompose_with_registry(program: Any, registry: Any) -> Any:
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        rest = [str(target) for target in targets if not registry.is_registered(target)]
        done = all(name.startswith(("onnx.", "aten._assert")) for name in rest)
        return program if done else decompose(program, registry)

    return decompose_with_registry


def _without_decomposing() -> dict[Any, Any]:
    """Operators of our models that decomposing makes others of: aten.to, for which torchlib has no function, and reshape, whose
    function copies a dimension of the input where one is 0."""

    def to(x: Any, dtype: Any, *_: Any, **__: Any) -> Any:
        return opset18.Identity(x) if x.dtype == dtype else opset18.Cast(x, to=dtype)

    return {torch.ops.aten.to.dtype: to, torch.ops.aten.reshape.default: aten_view}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter tells its developers things that a headpool user can do nothing about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
