"""The canonical graph: the parts of the decoder traced once each, the layer stamped N times.

Tracing runs under fake tensors, so no weight is ever materialised, and its cost does not grow with depth: one trace for the
prologue, one for the epilogue and one for each *distinct* layer (layers differ only in their KV heads). The result names
every weight by its canonical parameter name and holds none of their bytes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter import contract
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
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def canonical_graph(config: ModelConfig, cache: CacheForm, dtype: str, logits: contract.Logits = "last") -> ir.Model:
    """The whole decoder over `headpool::GroupedAttention`, one node a layer, with the bindings of exporter/contract.py.

    Weights are initialisers with type and shape and no value; their names are the canonical parameter names.
    """
    inputs = {binding.name: _value(binding) for binding in contract.inputs(config, cache, dtype)}
    stamper = Stamper(inputs.values(), opset=OPSET, domains={canonical.DOMAIN: canonical.VERSION})
    ids, positions, mask = inputs["input_ids"], inputs["position_ids"], inputs.get("attention_mask")
    trace = _Tracer(cache, TORCH_DTYPES[dtype], config)

    x, *angles = stamper.stamp(trace.prologue(), "model", [ids, positions])
    layers: dict[int, ir.Model] = {}
    present: list[ir.Value] = []
    for index, kv_heads in enumerate(config.kv_heads):
        if kv_heads not in layers:
            layers[kv_heads] = trace.layer(kv_heads)
        past = [inputs[name] for name in contract.past_names(index)]
        shared = [positions, *([mask] if mask is not None else [])]
        x, *caches = stamper.stamp(layers[kv_heads], f"model.layers.{index}", [x, *angles, *shared, *past])
        present += caches
    weight = stamper.initializer(EMBEDDING if config.tied else HEAD, IR_DTYPES[dtype], (config.vocab_size, config.hidden_size))
    (scores,) = stamper.stamp(trace.epilogue(logits), "model", [x, positions, weight])
    if config.rope.kind != "none":
        stamper.initializers["model.rotary.inv_freq"].const_value = ir.tensor(frequencies(config)[0].numpy())

    outputs = []
    for value, binding in zip([scores, *present], contract.outputs(config, cache, dtype, logits), strict=True):
        value.name = binding.name
        value.shape, value.dtype = ir.Shape(binding.shape), IR_DTYPES[binding.dtype]
        outputs.append(value)
    return stamper.finish(outputs, name=config.family)


def _value(binding: contract.Binding) -> ir.Value:
    return ir.Value(name=binding.name, shape=ir.Shape(binding.shape), type=ir.TensorType(IR_DTYPES[binding.dtype]))


class _Tracer:
    """torch.export → torch.onnx.export of one part, under fake tensors."""

    def __init__(self, cache: CacheForm, dtype: torch.dtype, config: ModelConfig) -> None:
        self.cache, self.dtype, self.config = cache, dtype, config
        # Sizes that stand for dynamic dimensions; distinct and not 0 or 1, which torch.export would bake in.
        self.B, self.T, self.P = 2, 3, 17

    def prologue(self) -> ir.Model:
        ids = (self.B, self.T)
        return self._trace(lambda: Prologue(self.config, self.dtype), [(ids, torch.long, (0, 1)), (ids, torch.long, (0, 1))])

    def layer(self, kv_heads: int) -> ir.Model:
        c, B, T, P = self.config, self.B, self.T, self.P
        angle = ((B, T, c.rotary_dim // 2), self.dtype, (0, 1)) if c.rope.kind != "none" else None
        mask = ((B, P + T), torch.long, (0, 1)) if self.cache == "concat" else None
        caches = [((B, kv_heads, P, size), self.dtype, (0, 2)) for size in (c.head_dim, c.value_dim)]
        x = ((B * T, c.hidden_size), self.dtype, (0,))
        positions = ((B, T), torch.long, (0, 1))
        return self._trace(lambda: Layer(c, kv_heads), [x, angle, angle, positions, mask, *caches])

    def epilogue(self, logits: contract.Logits) -> ir.Model:
        c, B, T = self.config, self.B, self.T
        x = ((B * T, c.hidden_size), self.dtype, (0,))
        weight = ((c.vocab_size, c.hidden_size), self.dtype, ())
        part = [x, ((B, T), torch.long, (0, 1)), weight]
        return self._trace(lambda: Epilogue(c, last_only=logits == "last"), part)

    def _trace(self, build: Callable[[], nn.Module], inputs: Sequence[Spec | None]) -> ir.Model:
        """None stands for an input the part does without."""
        with FakeTensorMode(), quiet():
            module = self._build(build)
            args = tuple(None if spec is None else torch.zeros(spec[0], dtype=spec[1]) for spec in inputs)
            shapes = tuple(None if spec is None else dict.fromkeys(spec[2], torch.export.Dim.DYNAMIC) for spec in inputs)
            program = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                custom_translation_table=onnx_translation(),
                verbose=False,
            )
        assert onnx_program is not None
        return onnx_program.model

    def _build(self, build: Callable[[], nn.Module]) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # Module.to does not work on fake parameters
        try:
            return build()
        finally:
            torch.set_default_dtype(before)


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
