"""A plain model becomes one with GLU attention that starts where it was, for `uptrain` to go on from.

V' = (W_V x) ⊙ SiLU(W_gate x + b) with W_gate = 0 and SiLU(b) = 1 is W_V x, whatever x is: the start is exact where values
keep their channels. It takes the bias to make it so; Q, K and V have biases too then, zeros. Gradients reach W_gate from the
first step on, through V.

Fewer channels, Dv < D, are what the V cache gains by: the values are then first approximated in Dv channels, by a truncated SVD
that folds into W_O (exporter/convert/fold.py), corrected by least squares on tokens.
"""

from __future__ import annotations

import dataclasses

import torch

from exporter.checkpoint.expected import expected_shapes
from exporter.config import ModelConfig
from exporter.errors import UserError
from exporter.weights import ComputedTensor, LazyTensor, Weights

OPEN = 1.2784645427610738  # SiLU of it is 1


def gated_config(config: ModelConfig, value_dim: int) -> ModelConfig:
    """`config` with GLU attention, values of `value_dim` channels a head. Raises UserError where that cannot start from it."""
    if config.glu_value_dim is not None:
        raise UserError(
            f"the model has GLU attention already, with values of {config.glu_value_dim} channels; leave --glu-values out"
        )
    if not 1 <= value_dim <= config.head_dim:
        raise UserError(f"glu-values {value_dim} is not from 1 to {config.head_dim}, the channels of the model's heads")
    return dataclasses.replace(config, glu_value_dim=value_dim, qkv_bias=True, family="headpool")


def with_gates(config: ModelConfig, weights: Weights) -> dict[str, LazyTensor]:
    """`weights` and what `config`, of `gated_config`, has besides: open gates, and biases of zero."""
    complete: dict[str, LazyTensor] = {}
    for name, shape in expected_shapes(config).items():
        value = OPEN if name.endswith("v_gate_proj.bias") else 0.0
        dtype = weights[name.replace("v_gate_proj", "v_proj").replace(".bias", ".weight")].dtype
        complete[name] = weights[name] if name in weights else _constant(name, shape, value, dtype)
    return complete


def _constant(name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> LazyTensor:
    return ComputedTensor(name, dtype, shape, lambda: torch.full(shape, value, dtype=dtype))
