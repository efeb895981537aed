"""Masks and cache rows that do not come from the positions as planned: each is refused, by name."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from changed import Graph, check

from exporter.errors import GraphError


def test_a_mask_that_is_left_out_is_refused(api, attention):
    graph = Graph(attention)
    del graph.nodes("Attention")[1].input[3:]
    with pytest.raises(GraphError, match="layer 1: its attention has no mask"):
        check(api, graph)


def test_a_mask_that_ignores_the_positions_is_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    node.input[3] = graph.constant("all seen", np.zeros((2, 1, 1, 32), np.float16))
    with pytest.raises(GraphError, match="layer 0: its mask does not come from position_ids"):
        check(api, graph)


def test_a_mask_of_the_positions_shape_alone_is_refused(api, attention):
    """All rows are seen by all: position_ids are read, but what they say is not."""
    graph = Graph(attention)
    node = graph.nodes("Attention")[0]
    tokens = graph.before(node, "Shape", ["position_ids"], "their shape", start=1, end=2)
    ends = graph.constant("batch, heads", np.array([2, 1])), tokens, graph.constant("rows", np.array([32]))
    shape = graph.before(node, "Concat", list(ends), "the mask's shape", axis=0)
    node.input[3] = graph.before(node, "Expand", [graph.constant("seen", np.zeros(1, np.float16)), shape], "all seen")
    with pytest.raises(GraphError, match="layer 0: its mask does not come from position_ids"):
        check(api, graph)


def test_rows_that_ignore_the_positions_are_refused(api, attention):
    graph = Graph(attention)
    graph.nodes("TensorScatter")[2].input[2] = graph.constant("rows", np.zeros(2, np.int64))
    with pytest.raises(GraphError, match=r"present.1.key: its rows do not come from position_ids"):
        check(api, graph)


def test_rows_of_the_positions_shape_alone_are_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("TensorScatter")[2]
    batch = graph.before(node, "Shape", ["position_ids"], "batch", start=0, end=1)
    node.input[2] = graph.before(node, "Expand", [graph.constant("first row", np.zeros(1, np.int64)), batch], "first rows")
    with pytest.raises(GraphError, match=r"present.1.key: its rows do not come from position_ids"):
        check(api, graph)


MASKS = {
    "later rows": lambda graph, node: node.input.__setitem__(slice(None), [node.input[1], node.input[0]]),
    "not its own row": lambda graph, node: setattr(node, "op_type", "Less"),
    "positions + 3": lambda graph, node: node.input.__setitem__(
        1, graph.before(node, "Add", [node.input[1], graph.constant("three", np.array(3))], "later")
    ),
}


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
@pytest.mark.parametrize("how", MASKS)
def test_a_mask_of_other_rows_is_refused(api, decoder, tmp_path, pattern, how):
    graph = Graph(tiny.bundle(tmp_path, decoder, pattern, dtype="fp16"))
    (compared,) = graph.nodes("LessOrEqual")
    MASKS[how](graph, compared)
    with pytest.raises(GraphError, match="layer 0: its mask does not let the rows up to position_ids be seen, and no others"):
        check(api, graph)


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_a_mask_that_hides_what_is_to_be_seen_or_nothing_is_refused(api, decoder, tmp_path, pattern):
    graph = Graph(tiny.bundle(tmp_path, decoder, pattern, dtype="fp16"))
    (chosen,) = graph.nodes("Where")
    seen, hidden = chosen.input[1:]
    chosen.input[1], chosen.input[2] = hidden, seen
    with pytest.raises(GraphError, match=r"its mask adds -16384.0 to rows that are seen and 0.0 to others"):
        check(api, graph)
    chosen.input[1], chosen.input[2] = seen, seen
    with pytest.raises(GraphError, match=r"its mask adds 0.0 to rows that are seen and 0.0 to others"):
        check(api, graph)
    chosen.input[2] = graph.constant("nan", np.array(np.nan, np.float16))
    with pytest.raises(GraphError, match=r"its mask adds 0.0 to rows that are seen and nan to others"):
        check(api, graph)


def test_a_mask_with_a_summand_more_is_refused(api, attention):
    """A bias is none of a decoder's."""
    graph = Graph(attention)
    node = graph.nodes("Attention")[1]
    more = graph.constant("more", np.full((1, 1, 1, 32), -1e4, np.float16))
    node.input[3] = graph.before(node, "Add", [node.input[3], more], "mask and more")
    with pytest.raises(GraphError, match="layer 1: its mask is no choice between rows that are seen and rows that are not"):
        check(api, graph)


def test_a_mask_of_fewer_rows_is_refused(api, attention):
    graph = Graph(attention)
    node = graph.nodes("Attention")[1]
    pads = graph.constant("pads", np.array([0, 0, 0, 0, 0, 0, 0, 1]))
    longer = graph.before(node, "Pad", [node.input[3], pads], "a row more")
    bounds = [graph.constant(name, np.array([at])) for name, at in (("from", 1), ("to", 33), ("of axis", 3))]
    node.input[3] = graph.before(node, "Slice", [longer, *bounds], "a row later")
    with pytest.raises(GraphError, match="layer 1: its mask"):
        check(api, graph)


@pytest.mark.parametrize("how", ["the next", "the last"])
def test_rows_other_than_the_first_position_are_refused(api, attention, how):
    graph = Graph(attention)
    node = graph.nodes("TensorScatter")[2]
    if how == "the next":
        node.input[2] = graph.before(node, "Add", [node.input[2], graph.constant("one", np.array(1))], "next rows")
    else:
        last = graph.constant("last", np.array(-1))
        node.input[2] = graph.before(node, "Gather", ["position_ids", last], "last rows", axis=1)
    with pytest.raises(GraphError, match=r"present.1.key: its rows do not come from position_ids, the first of each sequence"):
        check(api, graph)


def test_grouped_scores_without_a_mask_are_refused(api, grouped):
    graph = Graph(grouped)
    softmax = graph.nodes("Softmax")[1]
    softmax.input[0] = graph.output(softmax.input[0]).input[0]
    with pytest.raises(GraphError, match=r"layer 1 has no mask from position_ids on its scores"):
        check(api, graph)
