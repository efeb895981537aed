"""Linear layers that follow one another become one node, `headpool::LinearChain`, which keeps its threads between them.

Its values are numbered: the inputs of the node first, then what each stage gives, in order. Inputs: x and residuals [M,·], and
the weights of all stages, which are constant. Attributes:

stages    FORMAT, or HEAD, t and l for a node of one stage that gives logits [B,T,N] (l = 0), or [B,1,N] of each sequence's last
          token (l = 1): input t has the shape [B,T], and x is [B·T,K]. Then a stage after the other, each as x, residual,
          norm, activation, bits, the number of its layers, then w, scales and bias of every layer: values, or −1 for none.
          `activation` is a number in ACTIVATIONS: of two layers it makes the first the gate of the second, and the stage
          gives one value; of a single layer it is applied to what that gives. Other stages give as many values as they have
          layers. `bits` above 0: w is quantised (graphs/quantise.py).
epsilons  of the norms, one a stage.
offsets   one a stage: x is multiplied by offset + weight of the norm.
outputs   the values that are outputs of the node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from graphs.head import Head, find_head
from graphs.linear import insert, stage_of, take_over
from graphs.stamp import tidy

ACTIVATIONS = ("identity", "relu", "silu", "sigmoid", "gelu", "gelu_tanh")
NONE = -1
FORMAT, HEAD = -2, -3  # no value has such a number, so that a graph of another format is known


@dataclass
class _Chain:
    start: int  # the place of its first node in the graph, where all of it is going to be
    nodes: dict[ir.Node, None] = field(default_factory=dict)

    @property
    def gives(self) -> list[ir.Value]:
        return [value for node in self.nodes for value in node.outputs]

    @property
    def takes(self) -> list[ir.Value]:
        """Inputs from outside, each once."""
        inside = set(self.gives)
        return list(dict.fromkeys(v for node in self.nodes for v in node.inputs if v is not None and v not in inside))


def chain_linears(model: ir.Model) -> None:
    """Make every Linear and GatedLinear of `model` a part of a LinearChain, in place."""
    graph = model.graph
    head = find_head(graph)
    places = {node: place for place, node in enumerate(graph)}
    chains: list[_Chain] = []
    given: dict[ir.Value, _Chain] = {}
    for node, place in places.items():
        if (stage := stage_of(node)) is None:
            continue
        chain = given.get(stage.x)
        if chain is None or (head is not None and node is head.node) or not _early(stage.residual, chain, places):
            chains.append(chain := _Chain(place))
        chain.nodes[node] = None
        given |= dict.fromkeys(node.outputs, chain)
    for chain in chains:
        _write(graph, chain, head if head is not None and head.node in chain.nodes else None)
    if head is not None:
        tidy(model)  # of the nodes that were around it


def _early(value: ir.Value | None, chain: _Chain, places: dict[ir.Node, int]) -> bool:
    """Whether the chain can read it: it is the chain's own or there before the chain starts."""
    producer = value.producer() if value is not None else None
    return producer is None or producer in chain.nodes or places[producer] < chain.start


def _write(graph: ir.Graph, chain: _Chain, head: Head | None) -> None:
    """`head`: the one that the chain is."""
    inputs, gives = chain.takes, chain.gives
    if head is not None:
        inputs = [head.x if value is head.node.inputs[0] else value for value in inputs] + [head.tokens]
    numbers = {value: number for number, value in enumerate([*inputs, *gives])}
    outputs = [value for value in gives if any(use.node not in chain.nodes for use in value.uses())]
    stages = [stage for node in chain.nodes if (stage := stage_of(node))]
    records = [FORMAT]
    if head is not None:
        numbers[stages[0].x] = numbers[head.x]
        records = [HEAD, numbers[head.tokens], int(head.last)]
    for stage in stages:
        activation = NONE if stage.activation is None else ACTIVATIONS.index(stage.activation)
        data = [NONE if value is None else numbers[value] for value in (stage.x, stage.residual, stage.norm)]
        records += [*data, activation, stage.bits, len(stage.w)]
        for w, scales, bias in zip(stage.w, stage.scales, stage.bias, strict=True):
            records += [numbers[w], *(NONE if value is None else numbers[value] for value in (scales, bias))]
    first = next(iter(chain.nodes))
    new = insert(
        graph,
        first,
        first.name,
        "LinearChain",
        inputs,
        len(outputs),
        stages=records,
        epsilons=[stage.epsilon for stage in stages],
        offsets=[stage.offset for stage in stages],
        outputs=[numbers[value] for value in outputs],
    )
    for old, value in zip(outputs, new, strict=True):
        take_over(old, value)
    if head is not None:
        _bind(graph, head, new[0])
    for node in reversed(chain.nodes):
        graph.remove(node, safe=True)


def _bind(graph: ir.Graph, head: Head, new: ir.Value) -> None:
    """The graph gives `new` in the place of the head's logits."""
    old = head.logits
    reshape = old.producer()
    assert reshape is not None
    name, new.type, new.shape = old.name, old.type, old.shape
    graph.outputs[graph.outputs.index(old)] = new
    graph.remove(reshape, safe=True)
    new.name = name
