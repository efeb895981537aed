"""A bundle's graph to change, and what verification says of it once TensorRT has parsed it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporter.bundle import Bundle
from exporter.engines.tensorrt.api import Api, Messages
from exporter.engines.tensorrt.decompose import allow_decomposing
from exporter.engines.tensorrt.network import Network, parse
from exporter.engines.tensorrt.parts import Part, parts_of
from exporter.engines.tensorrt.record import Verified
from exporter.engines.tensorrt.verify import check_nodes, verify
from exporter.engines.tensorrt.weights import open_source

SIZES = {"batch": 2, "capacity": 32}


class Graph:
    """An ONNX graph to change: of the bundle's first variant, the part that decodes or the one that `index` counts."""

    def __init__(self, bundle: Bundle, index: int = -1) -> None:
        self.variant, self.index = bundle.variants[0], index
        self.source = open_source(bundle, self.part, SIZES["batch"], SIZES["capacity"])
        allow_decomposing(self.source, self.part)
        self.graph = self.source.model.graph

    @property
    def part(self) -> Part:
        return parts_of(self.variant)[self.index]

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == op_type]

    def before(self, node: onnx.NodeProto, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        index = list(self.graph.node).index(node)
        self.graph.node.insert(index, helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def output(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if name in node.output)


def check(api: Api, graph: Graph) -> Verified:
    parsed = parse(api, graph.source, Messages())
    network = Network(api.trt, parsed.definition, graph.source.numbers())
    facts = verify(network, graph.part, {**SIZES, **graph.part.known})
    check_nodes(graph.source, graph.part)
    return facts
