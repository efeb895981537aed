"""Attention that TensorRT has no fused kernel for: it may take it apart, and engine.json says so.

Without this mark such a build ends with "not supported by a dedicated kernel". Where there is a kernel the mark is left out:
then what TensorRT builds is fused, or it builds nothing.
"""

from __future__ import annotations

from onnx import helper

from exporter.engines.tensorrt.parts import Part
from exporter.engines.tensorrt.weights import Source


def allow_decomposing(source: Source, part: Part) -> None:
    """Mark every Attention node of `source` where all of the part's are planned so."""
    if not all(attention.decomposable for attention in part.attention):
        return
    for node in source.model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
