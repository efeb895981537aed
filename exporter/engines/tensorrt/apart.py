"""Linear layers of one input kept apart, so that TensorRT does not weave their weights together.

Gate and up (and Q, K and V) read the same norm. The builder makes one product of them, with their weights interleaved, in one
layout for each optimisation profile: a plan of SmolLM2 was 1.57 × its weights (1.05 × apart), and building it held 4.2 × the
weights (3.2 × apart; both as profiles/benchmarks/build.py measures). A norm of its own for each product keeps them as they lie
in the files. What is computed stays the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
            weight = makers.get(norm.input[1])  # where it is worked out, Gemma's of 1 and what is stored
            own = [] if weight is None else [_copy(source, weight, weight.input, tensors, suffix)]
            nodes += [*own, _copy(source, norm, norm.input[1:2], tensors, suffix)]
            if own:
                nodes[-1].input[1] = own[0].output[0]
            node.input[0] = nodes[-1].output[0]
            count += 1
        elif norm is not None:
            taken.add(norm.output[0])
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _copy(
    source: Source, node: onnx.NodeProto, weights: Iterable[str], tensors: Mapping[str, onnx.TensorProto], suffix: str
) -> onnx.NodeProto:
    """The node under another name, its `weights` other initialisers with the same bytes: the builder merges what is the same
    tensor."""
    twins = {name: _twin(source, tensors[name], suffix) for name in weights if name in tensors}
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name += suffix
    copy.input[:] = [twins.get(name, name) for name in node.input]
    copy.output[0] = node.output[0] + suffix
    return copy


def _twin(source: Source, weight: onnx.TensorProto, suffix: str) -> str:
    twin = onnx.TensorProto()
    twin.CopyFrom(weight)
    twin.name += suffix
    source.model.graph.initializer.append(twin)
    if weight.name in source.arrays:
        source.place(twin.name, source.arrays[weight.name])
    return twin.name
