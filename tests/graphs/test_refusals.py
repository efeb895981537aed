"""What the lowerings refuse, with the reason, and that a refusal changes nothing."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphs.canonical import DOMAIN, GroupedAttention, standalone
from graphs.errors import GraphError
from graphs.lower import lower
from graphs.patterns import PATTERNS


def node_of(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.domain == DOMAIN]
    return node


def refused(model: ir.Model, pattern: str) -> str:
    before = [str(node) for node in model.graph]
    with pytest.raises(GraphError) as caught:
        lower(model, pattern)
    assert [str(node) for node in model.graph] == before
    return str(caught.value)


def test_unknown_pattern_lists_the_choices():
    message = refused(standalone(8, 2, 16), "paged")
    assert message == "pattern 'paged' is not one of repeat, grouped, attention, gqa, fused"


def test_a_lowered_graph_is_not_lowered_again():
    lowered = lower(standalone(8, 2, 16), "grouped")
    assert "no headpool::GroupedAttention node" in refused(lowered, "gqa")


@pytest.mark.parametrize(("head_dim", "value_dim"), [(12, 12), (16, 20)])
def test_head_sizes_that_group_query_attention_lacks(head_dim, value_dim):
    message = refused(standalone(8, 2, head_dim, value_dim=value_dim), "gqa")
    assert f"its heads have {value_dim} channels; GroupQueryAttention wants a multiple of 8" in message


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kv_heads", [3, 5, 16])
def test_a_group_count_that_does_not_divide(pattern, kv_heads):
    model = standalone(8, 2, 16)
    node_of(model).attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", kv_heads)
    assert f"{kv_heads} KV heads do not divide 8 query heads" in refused(model, pattern)


@pytest.mark.parametrize(("attribute", "value"), [("num_heads", 0), ("kv_num_heads", -2)])
def test_head_counts_above_zero(attribute, value):
    model = standalone(8, 2, 16)
    node_of(model).attributes[attribute] = ir.AttrInt64(attribute, value)
    assert f"needs {attribute} above 0" in refused(model, "grouped")


def test_scale_above_zero():
    model = standalone(8, 2, 16)
    node_of(model).attributes["scale"] = ir.AttrFloat32("scale", 0.0)
    assert "needs a scale above 0" in refused(model, "grouped")


def test_both_cache_forms_at_once():
    model = standalone(8, 2, 16)
    mask = ir.Value(name="attention_mask", shape=ir.Shape(["B", "total"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(mask)
    old = node_of(model)
    new = ir.Node(DOMAIN, old.op_type, [*old.inputs[:6], mask], list(old.attributes.values()), num_outputs=3, name="both")
    with pytest.raises(GraphError, match=r"either position_ids \(static cache\) or attention_mask"):
        GroupedAttention(new)


def test_missing_input_and_output():
    model = standalone(8, 2, 16)
    old = node_of(model)
    attributes = list(old.attributes.values())
    inputs = [old.inputs[0], old.inputs[1], None, old.inputs[3], None, old.inputs[5]]
    lacking = ir.Node(DOMAIN, old.op_type, inputs, attributes, num_outputs=3, name="n")
    with pytest.raises(GraphError, match="lacks its input value, past_value"):
        GroupedAttention(lacking)
    short = ir.Node(DOMAIN, old.op_type, old.inputs, attributes, num_outputs=1, name="n")
    with pytest.raises(GraphError, match="has 1 outputs"):
        GroupedAttention(short)


def test_another_node_is_not_taken_for_it():
    with pytest.raises(GraphError, match="not headpool::GroupedAttention"):
        GroupedAttention(ir.node("MatMul", [None, None], name="m"))


def test_integer_cache():
    model = standalone(8, 2, 16)
    model.graph.inputs[3].type = ir.TensorType(ir.DataType.INT8)
    assert "has a cache of INT8" in refused(model, "grouped")


def test_cache_without_a_known_head_size():
    model = standalone(8, 2, 16)
    model.graph.inputs[3].shape = ir.Shape(["B", 2, "S", "D"])
    assert "with D a number" in refused(model, "grouped")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lowering_keeps_names_types_and_shapes(pattern):
    model = standalone(8, 2, 16)
    lowered = lower(model, pattern)
    for before, after in ((model.graph.inputs, lowered.graph.inputs), (model.graph.outputs, lowered.graph.outputs)):
        assert [(v.name, v.dtype, str(v.shape)) for v in before] == [(v.name, v.dtype, str(v.shape)) for v in after]


def test_what_each_pattern_is_made_of():
    ops = {pattern: [node.op_type for node in lower(standalone(8, 2, 16), pattern).graph] for pattern in PATTERNS}
    assert ops["attention"].count("Attention") == 1
    assert ops["attention"].count("TensorScatter") == 2
    assert ops["gqa"].count("GroupQueryAttention") == 1
    assert "TensorScatter" not in ops["gqa"]
    assert ops["repeat"].count("Expand") == 2
    assert "Expand" not in ops["grouped"]
    assert ops["grouped"].count("MatMul") == 2
    no_group = [node.op_type for node in lower(standalone(8, 8, 16), "repeat").graph]
    assert "Expand" not in no_group
