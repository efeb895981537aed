"""Weight-only quantisation of a graph on its way to TensorRT: w ≈ q · scale, one scale for each block of K.

The weight [N,K] of a linear layer becomes DequantizeLinear(q [N,K], scale [N,K/block], axis 1), which TensorRT keeps in front
of the product; q is symmetric and rounded to the nearest. The embedding and the output head stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.bundle import Variant
from exporter.engines.tensorrt.weights import Source
from exporter.errors import EngineError, GraphError

BLOCKS = (128, 64, 32, 16)
ELEMENTS = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
KEPT = ("embed_tokens.weight", "embed_positions.weight", "shared.weight", "lm_head.weight")  # what every output depends on
DEQUANTISED = ".dequantised"  # after the weight's name: the node that stands for it


@dataclass(frozen=True)
class Kind:
    """A quantised dtype: ONNX's number for it, the largest magnitude, and the chips that compute with it."""

    element: int
    largest: float
    least_chip: int  # compute capability as in sm89

    def check(self, name: str, targets: tuple[str, ...]) -> None:
        """Refuse targets that lack the dtype. Raises EngineError."""
        if lacking := [target for target in targets if int(target[2:]) < self.least_chip]:
            lack = f"lacks {name}" if len(lacking) == 1 else f"lack {name}"
            raise EngineError(f"{', '.join(lacking)} {lack}, which starts with sm{self.least_chip}; leave out of --target")


KINDS = {
    "int8": Kind(TensorProto.INT8, 127, 75),
    "int4": Kind(TensorProto.INT4, 7, 80),
    "fp8": Kind(TensorProto.FLOAT8E4M3FN, 448, 89),
}


def check_quantize(kind: str | None, variant: Variant, targets: tuple[str, ...]) -> None:
    """Refuse what a target lacks and what TensorRT does not multiply by. Raises EngineError."""
    if variant.quantize is not None:
        raise EngineError(
            f"variant {variant.name} has {variant.quantize} weights as ONNX Runtime reads them; export it without --quantize, "
            f"and build it with --quantize {variant.quantize}"
        )
    if kind is None:
        return
    KINDS[kind].check(kind, targets)
    if variant.dtype == "fp32":
        raise EngineError(f"variant {variant.name} is fp32; quantised weights need fp16 or bf16 beside them: export it so")
    config = variant.config
    for what, width in (
        ("hidden size", config.hidden_size),
        ("intermediate size", config.intermediate_size),
        ("size of all heads", config.num_heads * config.value_dim),
    ):
        if width % BLOCKS[-1]:
            raise EngineError(
                f"variant {variant.name} has the {what} {width}, which is no multiple of {BLOCKS[-1]}; its weights cannot be "
                "quantised in blocks: leave --quantize out"
            )


def quantize_weights(source: Source, kind: str, dtype: str) -> list[str]:
    """Put DequantizeLinear in front of every linear layer of `source`; the weights' names. Raises GraphError by name."""
    graph = source.model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes, done = [], dict[str, str]()  # weight → what stands for it
    for node in graph.node:
        name = node.input[1] if node.op_type == "Gemm" else ""
        if name in tensors and not name.endswith(KEPT):
            if name not in done:
                nodes.append(_dequantize(source, tensors[name], kind, dtype))
                done[name] = nodes[-1].output[0]
            node.input[1] = done[name]
        nodes.append(node)
    if not done:
        raise GraphError(f"{source.path.name} has no linear layer with a weight to quantise")
    kept = [tensor for tensor in graph.initializer if tensor.name not in done]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return list(done)


def _dequantize(source: Source, tensor: onnx.TensorProto, kind: str, dtype: str) -> onnx.NodeProto:
    name, shape = tensor.name, tuple(tensor.dims)
    element, numpy_dtype = ELEMENTS[dtype]
    if tensor.data_type != element or len(shape) != 2:
        raise GraphError(f"{source.path.name}: weight {name} is no {dtype} matrix; only those are quantised")
    block = next(block for block in BLOCKS if shape[1] % block == 0)  # check_quantize has seen to it
    if name in source.arrays:
        values = source.arrays.pop(name).view(numpy_dtype)
        del source.places[name]
    else:
        values = numpy_helper.to_array(tensor)
    source.saved += values.nbytes
    quantised, scale = quantize(values.reshape(shape).astype(np.float32), kind, block, numpy_dtype)
    _add(source, f"{name}.{kind}", KINDS[kind].element, shape, quantised)
    _add(source, f"{name}.scale", element, scale.shape, scale)
    inputs, output = [f"{name}.{kind}", f"{name}.scale"], name + DEQUANTISED
    return helper.make_node("DequantizeLinear", inputs, [output], name=output, axis=1, block_size=block)


def quantize(weight: np.ndarray, kind: str, block: int, scale_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N,K] → bytes of q in ONNX's layout (int4: two in a byte, the first in the low half) and scale [N,K/block]."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block)
    largest = KINDS[kind].largest
    scale = (np.abs(blocks).max(axis=2) / largest).astype(scale_dtype)
    scale[scale == 0] = 1  # a block of zeros, or of less than the dtype's smallest number
    q = np.clip(blocks / scale.astype(np.float32)[:, :, None], -largest, largest).reshape(-1)
    if kind == "fp8":
        return q.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale
    q = np.rint(q).astype(np.int8)
    if kind == "int8":
        return q.view(np.uint8), scale
    return (q[0::2] & 15 | (q[1::2] & 15) << 4).view(np.uint8), scale


def _add(source: Source, name: str, element: int, shape: tuple[int, ...], data: np.ndarray) -> None:
    """An initialiser whose bytes stay in memory of ours; the place it names is never read."""
    tensor = onnx.TensorProto(name=name, data_type=element, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    for key, value in (("location", "memory"), ("offset", "0"), ("length", str(data.nbytes))):
        tensor.external_data.add(key=key, value=value)
    source.model.graph.initializer.append(tensor)
    source.place(name, data)
    source.saved -= data.nbytes
