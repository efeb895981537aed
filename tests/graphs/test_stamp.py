"""Small rewrites of whole graphs: what they leave, and that it computes the same."""

import harness
import numpy as np
import onnx_ir as ir
import pytest

from graphs.stamp import fuse_reshapes, tidy


def graph(nodes: list[str]) -> ir.Model:
    """x [2, a, b] → Shape → `nodes`, each named by its operator, → Reshape of x to them → y."""
    x = ir.Value(name="x", shape=ir.Shape([2, "a", "b"]), type=ir.TensorType(ir.DataType.FLOAT))
    minus = ir.Value(
        name="minus", const_value=ir.tensor(np.array([-1])), shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)
    )
    made = [ir.Node("", "Shape", [x])]
    for kind in nodes:
        value = made[-1].outputs[0]
        made.append(ir.Node("", kind, [value, minus] if kind == "Reshape" else [value]))
    made.append(ir.Node("", "Reshape", [x, made[-1].outputs[0]]))
    y = made[-1].outputs[0]
    y.name = "y"
    y.type = x.type
    return ir.Model(ir.Graph([x], [y], nodes=made, initializers=[minus], opset_imports={"": 24}, name="g"), ir_version=10)


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        (["Squeeze", "Reshape"], ["Shape", "Reshape"]),
        (["Abs", "Reshape"], ["Shape", "Abs", "Reshape", "Reshape"]),
        (["Abs", "Squeeze", "Reshape"], ["Shape", "Abs", "Squeeze", "Reshape", "Reshape"]),
        ([], ["Shape", "Reshape"]),
    ],
)
def test_sizes_need_no_reshape(nodes, left):
    model = graph(nodes)
    tidy(model)
    assert [node.op_type for node in model.graph] == left
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (y,) = harness.ort_session(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(y, x)


def test_another_target_stays():
    model = graph(["Squeeze", "Reshape"])
    model.graph.initializers["minus"].const_value = ir.tensor(np.array([1, -1]))
    fuse_reshapes(model.graph)
    assert [node.op_type for node in model.graph] == ["Shape", "Squeeze", "Reshape", "Reshape"]
    assert model.graph[-1].inputs[1].producer().op_type == "Reshape"
