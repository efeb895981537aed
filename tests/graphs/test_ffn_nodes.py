"""What each of the eight FFNs comes to: nodes of its part of a layer, and its logits, in `fused` and in standard operators."""

from __future__ import annotations

import collections

import harness
import numpy as np
import pytest
from test_lower import CAPACITY, close, prompts, torch_logits

from exporter.config import FFN_KINDS
from exporter.trace import canonical_graph
from graphs.lower import lower

# Nodes of the FFN itself, its norm and sum apart: two matrices or three, and what is between them.
STANDARD = {
    "relu": {"Gemm": 2, "Relu": 1},
    "gelu": {"Gemm": 2, "Gelu": 1},
    "swish": {"Gemm": 2, "Sigmoid": 1, "Mul": 1},
    "glu": {"Gemm": 3, "Sigmoid": 1, "Mul": 1},
    "bilinear": {"Gemm": 3, "Mul": 1},
    "reglu": {"Gemm": 3, "Relu": 1, "Mul": 1},
    "geglu": {"Gemm": 3, "Gelu": 1, "Mul": 1},
    "swiglu": {"Gemm": 3, "Sigmoid": 1, "Mul": 2},
}


@pytest.mark.parametrize("ffn", FFN_KINDS)
def test_nodes(ffn):
    canonical = canonical_graph(harness.tiny_config((2, 2), ffn=ffn), "static", "fp32")
    layer = [node for node in lower(canonical, "grouped").graph if (node.name or "").startswith("/model/layers.1/mlp/")]
    assert collections.Counter(node.op_type for node in layer) == STANDARD[ffn]
    fused = [node.op_type for node in lower(canonical, "fused").graph if (node.name or "").startswith("/model/layers.1/")]
    assert collections.Counter(fused) == {"LinearChain": 1, "FusedAttention": 1}  # the FFN is in the chain, whatever its kind


@pytest.mark.parametrize("ffn", FFN_KINDS)
@pytest.mark.parametrize(("bias", "norm"), [(False, "rms"), (True, "layer")])
def test_fused_logits(ffn, bias, norm):
    """Few rows of x (decode) and many (prefill) go other ways in the operator."""
    config = harness.tiny_config((2, 2), ffn=ffn, ffn_bias=bias, norm=norm, gelu_tanh=bias)
    decoder = harness.random_decoder(config)
    sess = harness.session(decoder, "fused", "static")
    (prompt,) = prompts(config, [CAPACITY])
    expected, past, done = torch_logits(decoder, prompt), harness.empty(config, 1, CAPACITY), 0
    for chunk in (CAPACITY - 4, 3, 1):
        ids, positions = prompt[None, done : done + chunk], np.arange(done, done + chunk)[None]
        logits, past = harness.run(sess, config, ids, positions, past)
        close(logits[0], expected[done : done + chunk], 0)
        done += chunk
