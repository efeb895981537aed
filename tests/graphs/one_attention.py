"""One attention as a canonical graph, RotaryEmbedding before it or not, and random inputs for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphs.canonical import standalone


def build(H: int, G: int, D: int, Dv: int, rotary: int, query: str = "cos", key: str = "cos", **attributes) -> ir.Model:
    """The canonical node alone; with `rotary` channels, RotaryEmbedding before query and key by the angles so called."""
    model = standalone(H, G, D, value_dim=Dv)
    graph, node = model.graph, model.graph.node(0)
    if not rotary:
        return model
    shape, data = ir.Shape(["B", "T", rotary // 2]), ir.TensorType(ir.DataType.FLOAT)
    angles = {name: ir.Value(name=name, shape=shape, type=data) for name in dict.fromkeys((query, key, "sin"))}
    graph.inputs.extend(angles.values())
    for index, cos, heads in ((0, query, H), (1, key, G)):
        given_attributes = {"num_heads": heads, "rotary_embedding_dim": rotary if rotary < D else 0, **attributes}
        rotate = ir.node("RotaryEmbedding", [node.inputs[index], angles[cos], angles["sin"]], given_attributes)
        rotate.outputs[0].name, rotate.outputs[0].shape, rotate.outputs[0].type = f"rotated.{index}", shape, data
        rotate.outputs[0].shape = node.inputs[index].shape
        graph.insert_before(node, rotate)
        node.replace_input_with(index, rotate.outputs[0])
    return model


def feeds(H, G, D, Dv, rotary, starts, T, S, seed=0) -> dict[str, np.ndarray]:
    """Random inputs; sequence b stands at row starts[b]. The cache rows from there on are NaN."""
    rng, B = np.random.default_rng(seed), len(starts)
    shapes = {"query": (B, T, H * D), "key": (B, T, G * D), "value": (B, T, G * Dv)}
    shapes |= {"past_key": (B, G, S, D), "past_value": (B, G, S, Dv)}
    result = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name in ("past_key", "past_value"):
        for b, start in enumerate(starts):
            result[name][b, :, start:] = np.nan
    if rotary:
        angles = rng.uniform(0, 7, (B, T, rotary // 2)).astype(np.float32)
        result |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    return result | {"position_ids": np.array(starts)[:, None] + np.arange(T)}
