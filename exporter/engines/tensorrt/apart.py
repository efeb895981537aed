"""Linear layers of one input kept apart, so that TensorRT does not weave their weights together.

Gate and up (and Q, K and V) read the same norm. The builder makes one product of them, with their weights interleaved, in one
layout for each optimisation profile, so that a plan holds and building takes more than the weights once (tests hold a plan to
little more). A norm of its own for each product keeps them as they lie in the files. What is computed stays the same, bit by
bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from exporter.engines.tensorrt.weights import Source

NORMS = ("RMSNormalization", "LayerNormalization")


def keep_apart(source: Source) -> int:
    """Give each linear layer but the first of a norm a copy of that norm, with weights that look like others; how many."""
    graph, taken, count = source.model.graph, set[str](), 0
    makers = {node.output[0]: node for node in graph.node}
    norms = {node.output[0]: node for node in graph.node if node.op_type in NORMS}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        norm = norms.get(node.input[0]) if node.op_type == "Gemm" else None
        if norm is not None and norm.output[0] in taken:
            suffix = f".apart{count}"
            copy = _copy(norm, suffix)
            copy.input[1] = _again(source, norm.input[1], suffix, makers, tensors, nodes)
            nodes.append(copy)
            node.input[0] = nodes[-1].output[0]
            count += 1
        elif norm is not None:
            taken.add(norm.output[0])
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _again(
    source: Source,
    name: str,
    suffix: str,
    makers: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> str:
    """The tensor under another name: another initialiser with the same bytes, as the builder merges what is the same one, or
    worked out of such ones again, as Gemma's 1 + weight is."""
    if name in makers:
        copy = _copy(makers[name], suffix)
        copy.input[:] = [_again(source, given, suffix, makers, tensors, nodes) for given in makers[name].input]
        nodes.append(copy)
        return copy.output[0]
    twin = onnx.TensorProto()
    twin.CopyFrom(tensors[name])
    twin.name += suffix
    source.model.graph.initializer.append(twin)
    if name in source.arrays:
        source.place(twin.name, source.arrays[name])
    return twin.name


def _copy(node: onnx.NodeProto, suffix: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name += suffix
    copy.output[0] += suffix
    return copy
