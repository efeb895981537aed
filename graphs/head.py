"""The output head: where the last linear layer gives the logits flat, and nodes around it turn them into what is bound.

    x [B·T,K] → Reshape [B,T,K] → Gather the last of T → Linear → Reshape [B,1,N]      of the last token of each sequence
    x [B·T,K] → Linear → Reshape [B,T,N]                                               of all

The shapes are worked out from an input [B,T] by nodes of their own, and the last Reshape copies the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.linear import stage_of


@dataclass(frozen=True)
class Head:
    node: ir.Node  # the Linear
    reader: ir.Node  # what reads x: the Linear itself, or the first Reshape
    tokens: ir.Value  # [B,T]
    logits: ir.Value  # the graph's output

    @property
    def x(self) -> ir.Value:
        """[B·T,K]."""
        assert self.reader.inputs[0] is not None
        return self.reader.inputs[0]

    @property
    def last(self) -> bool:
        return self.reader is not self.node


def find_head(graph: ir.Graph) -> Head | None:
    """None where the graph has no such head: then its nodes stay as they are."""
    for logits in graph.outputs:
        reshape = _node(logits, "Reshape")
        node = reshape.inputs[0].producer() if reshape is not None and reshape.inputs[0] is not None else None
        stage = stage_of(node) if node is not None else None
        if reshape is None or node is None or stage is None or stage.residual is not None or len(node.outputs) > 1:
            continue
        if len(node.outputs[0].uses()) > 1 or node.outputs[0].is_graph_output():
            continue
        match _target(reshape):
            case [(ir.Value() as tokens, 0), (other, 1), -1] if other is tokens:
                reader = node
            case [(ir.Value() as tokens, 0), 1, -1] if (found := _last_of(stage.x, tokens)) is not None:
                reader = found
            case _:
                continue
        head = Head(node, reader, tokens, logits)
        if all(value.shape is not None and len(value.shape) == 2 for value in (head.x, tokens)):
            return head
    return None


def _last_of(x: ir.Value, tokens: ir.Value) -> ir.Node | None:
    """The Reshape of flat rows of which x is each sequence's last."""
    gather = _node(x, "Gather")
    if gather is None or gather.attributes["axis"].as_int() != 1 or len(x.uses()) > 1:
        return None
    index = ir.convenience.get_const_tensor(gather.inputs[1]) if gather.inputs[1] is not None else None
    reshape = _node(gather.inputs[0], "Reshape")
    if reshape is None or index is None or index.numpy().tolist() != -1:
        return None
    match _target(reshape):
        case [(first, 0), (second, 1), -1] if first is tokens and second is tokens:
            return reshape
    return None


def _target(reshape: ir.Node) -> list[tuple[ir.Value, int] | int | None]:
    """The parts of a Reshape's target: a dimension of a value, a number, or None for what is neither."""
    concat = _node(reshape.inputs[1], "Concat")
    return [] if concat is None else [_part(value) for value in concat.inputs]


def _part(value: ir.Value | None) -> tuple[ir.Value, int] | int | None:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    if constant is not None:
        return int(constant.numpy().item()) if constant.size == 1 else None
    shape = _node(value, "Shape")
    if shape is None or shape.inputs[0] is None or not {"start", "end"} <= shape.attributes.keys():
        return None
    start, end = (shape.attributes[name].as_int() for name in ("start", "end"))
    return (shape.inputs[0], start) if end == start + 1 else None


def _node(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None
