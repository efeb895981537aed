"""What each of the eight FFNs comes to: nodes of its part of a layer, and its logits, in `fused` and in standard operators."""

from __future__ import annotations

import collections

import harness
import pytest
from test_lower import CAPACITY, close, in_chunks, prompts, torch_logits
from tiny import canonical

from exporter.config import FFN_KINDS
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
    graph = canonical(harness.tiny_config((2, 2), ffn=ffn), "static", "fp32", "all")
    layer = [node for node in lower(graph, "grouped").graph if (node.name or "").startswith("/model/layers.1/mlp/")]
    assert collections.Counter(node.op_type for node in layer) == STANDARD[ffn]
    fused = [node.op_type for node in lower(graph, "fused").graph if (node.name or "").startswith("/model/layers.1/")]
    assert collections.Counter(fused) == {"LinearChain": 1, "FusedAttention": 1}  # the FFN is in the chain, whatever its kind


@pytest.mark.parametrize("ffn", FFN_KINDS)
@pytest.mark.parametrize(("bias", "norm"), [(False, "rms"), (True, "layer")])
def test_fused_logits(ffn, bias, norm):
    """Few rows of x (decode) and many (prefill) go other ways in the operator."""
    config = harness.tiny_config((2, 2), ffn=ffn, ffn_bias=bias, norm=norm, gelu_tanh=bias)
    decoder = harness.random_decoder(config)
    sess = harness.session(decoder, "fused", "static")
    (prompt,) = prompts(config, [CAPACITY])
    expected = torch_logits(decoder, prompt)
    for rows, logits, _ in in_chunks(sess, config, prompt, (CAPACITY - 4, 3, 1), "static"):
        close(logits, expected[rows], 0)
