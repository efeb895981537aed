"""Attention over K and V heads of two sizes, which TensorRT's fused layer does not take: zeros beside the smaller ones.

GLU attention has a V of fewer channels than K. The cache stays as small as it is; what is read of it in a step is padded, and
of the output the channels that are there are kept. What is computed stays the same: zeros add nothing to scores or sums.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporter.config import ModelConfig
from exporter.engines.tensorrt.weights import Source


def one_head_size(source: Source, config: ModelConfig) -> None:
    """Pad Q and K, or V, of every Attention node of `source` where D and Dv differ."""
    D, Dv = config.head_dim, config.value_dim
    if Dv == D:
        return
    constants = {"heads.pads": [0] * 7 + [abs(D - Dv)], "heads.start": [0], "heads.end": [Dv], "heads.axis": [3]}
    graph, nodes = source.model.graph, list[onnx.NodeProto]()
    graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items())
    for node in graph.node:
        if node.op_type != "Attention":
            nodes.append(node)
            continue
        for index in (0, 1) if Dv > D else (2,):
            padded = f"{node.name}.padded{index}"
            nodes.append(helper.make_node("Pad", [node.input[index], "heads.pads"], [padded], name=padded))
            node.input[index] = padded
        nodes.append(node)
        if Dv < D:
            narrow, wide = node.output[0], f"{node.name}.wide"
            node.output[0] = wide
            ends = ["heads.start", "heads.end", "heads.axis"]
            nodes.append(helper.make_node("Slice", [wide, *ends], [narrow], name=f"{node.name}.narrow"))
    del graph.node[:]
    graph.node.extend(nodes)
