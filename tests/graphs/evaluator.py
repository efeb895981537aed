"""onnx's own reference implementation in bf16, for ONNX Runtime's CPU has no kernels of it.

As it stands, `ReferenceEvaluator` mixes dtypes: its MatMul of bf16 gives float32, and its sums run in bf16. Here every operator
but Cast takes float32 and rounds what it gives to bf16 once, as a kernel does that accumulates in float32. Gelu, which it
lacks, is here.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops._op_list import load_op

BF16 = np.dtype(ml_dtypes.bfloat16)


class Gelu(OpRun):
    """Hendrycks & Gimpel 2016 (arXiv 1606.08415), section 2: x Φ(x), and its approximation by tanh."""

    def _run(self, x: Any, approximate: str) -> tuple[Any]:
        inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if approximate == "tanh" else ERF(x / math.sqrt(2))
        return ((0.5 * x * (1 + inner)).astype(x.dtype),)


ERF = np.vectorize(math.erf)


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """`run(None, feeds)` of a graph of standard operators; bf16 in and out."""
    [opset] = [imported.version for imported in model.opset_import if imported.domain == ""]
    names = sorted({node.op_type for node in model.graph.node} - {"Cast"})
    return ReferenceEvaluator(model, new_ops=[_rounded(name, opset) for name in names])


def _rounded(name: str, opset: int) -> type:
    base: Any = Gelu if name == "Gelu" else load_op("", name, opset)

    def run(self: Any, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        if not any(_is_bf16(value) for value in inputs):
            return base._run(self, *inputs, **attributes)
        wide = [value.astype(np.float32) if _is_bf16(value) else value for value in inputs]
        outputs = base._run(self, *wide, **attributes)
        return tuple(value.astype(BF16) if value.dtype.kind == "f" else value for value in outputs)

    return type(name, (base,), {"op_domain": "", "_run": run})


def _is_bf16(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype == BF16
