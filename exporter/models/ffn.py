"""The eight feed-forward layers of "GLU Variants Improve Transformer" (Shazeer 2020, arXiv 2002.05202).

Ungated, equations 1-3: FFN_act(x) = act(x W_up) W_down. Gated, equations 5-6: FFN(x) = (act(x W_gate) ⊗ x W_up) W_down, where
act is sigmoid for GLU, the identity for Bilinear, ReLU, GELU and Swish₁ for ReGLU, GEGLU and SwiGLU. (The paper's W is our
gate, its V our up, its W₂ our down.) `exporter.config.two_thirds` gives the d_ff that keeps the parameters equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "glu": torch.sigmoid,
    "bilinear": lambda x: x,
    "reglu": F.relu,
    "geglu": F.gelu,
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    """x [·, d] → [·, d] through d_ff = config.intermediate_size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, d_ff, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
        self.gate_proj = nn.Linear(d, d_ff, bias=bias) if config.gated else None
        self.up_proj = nn.Linear(d, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d, bias=bias)
        if config.gelu_tanh and config.ffn in ("gelu", "geglu"):
            self.activation: Callable[[Tensor], Tensor] = lambda x: F.gelu(x, approximate="tanh")
        else:
            self.activation = ACTIVATIONS[config.ffn]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
