"""A node's own scale, which no family of today sets to anything but 1/√D, in every pattern, against torch's attention."""

from __future__ import annotations

import harness
import numpy as np
import onnx_ir as ir
import pytest
import torch

from graphs.canonical import standalone
from graphs.lower import lower

H, G, D, T = 8, 2, 16, 6
MATRIX = [(pattern, static) for pattern in ("repeat", "grouped", "attention", "gqa") for static in (True, False)]


@pytest.mark.parametrize(("pattern", "static"), [*MATRIX, ("fused", True)])
@pytest.mark.parametrize("scale", [0.05, 0.6])
def test_scale(pattern: str, static: bool, scale: float):
    model = standalone(H, G, D, static)
    model.graph.node(0).attributes["scale"] = ir.AttrFloat32("scale", scale)
    session = harness.ort_session(ir.to_proto(lower(model, pattern)), own_operators=pattern == "fused")
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, T, heads * D)).astype(np.float32) for heads in (H, G, G))
    past = np.zeros((1, G, T if static else 0, D), np.float32)
    feeds = {"query": query, "key": key, "value": value, "past_key": past, "past_value": past}
    feeds |= {"position_ids": np.arange(T)[None]} if static else {"attention_mask": np.ones((1, T), np.int64)}
    found = session.run(["output"], feeds)[0]
    heads = (torch.from_numpy(x).unflatten(2, (-1, D)).transpose(1, 2) for x in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
    np.testing.assert_allclose(found, wanted.transpose(1, 2).flatten(2), rtol=0, atol=1e-5)  # sums of ~100 products near 1
