"""Every linear layer of a decoder rounded by GPTQ on calibration tokens, one after the other, each on what the rounded ones
before it make of them.

A stream of hidden states runs through the model. The forward of a layer is run once: when it comes to a product, the weight is
rounded for what it is about to multiply, and the forward goes on with that. In memory are a layer's weights, the activations of
all tokens in it, their attention scores, n · H · T² floats, and the moments of one input; what is rounded waits on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from exporter.checkpoint.expected import EMBEDDING, HEAD
from exporter.checkpoint.safetensors_io import refuse_non_finite
from exporter.config import ModelConfig
from exporter.convert.scratch import Scratch
from exporter.convert.walk import Walk
from exporter.errors import CheckpointError
from exporter.models.decoder import Rotary
from exporter.quantise.blocks import dequantise, quantise
from exporter.quantise.gptq import gptq, inverse_factor
from exporter.weights import ComputedTensor, LazyTensor, Weights
from graphs.quantise import Form

Progress = Callable[[str, int, int], None]  # what, done, total
Stored = tuple[LazyTensor, ...]  # the parts of a matrix in its form


@torch.no_grad()
def calibrated(config: ModelConfig, weights: Weights, form: Form, tokens: np.ndarray, progress: Progress) -> dict[str, Stored]:
    """Of the layers' matrices and the output head, by name. tokens is int64 [n,T]: n windows.

    A tied head decides for the embedding, too; layers are calibrated on its rows rounded to the nearest. Raises CheckpointError
    where a weight, or what a product reads, is not finite.
    """
    (n, T), total = tokens.shape, config.num_layers + 1
    walk, rounder = Walk(config, _with_rounded_embedding(weights, form), T), Rounder(form)
    positions = torch.arange(T).expand(n, T)
    angles = (None, None) if config.rope.kind == "none" else Rotary(config, torch.float32)(positions)
    x = walk.embed(torch.from_numpy(tokens)).flatten(0, 1)
    for index, kv_heads in enumerate(config.kv_heads):
        progress("calibrating weights", index, total)
        layer = rounder.watch(walk.whole(index), f"model.layers.{index}.")
        caches = (x.new_zeros(n, kv_heads, T, size) for size in (config.head_dim, config.value_dim))
        x = layer(x, *angles, positions, None, *caches)[0]
    progress("calibrating weights", config.num_layers, total)
    norm, _ = walk.head()
    head = EMBEDDING if config.tied else HEAD
    rounder.round(head, weights[head].read(), norm(x))
    progress("calibrating weights", total, total)
    return rounder.found


class Rounder:
    """Rounds what multiplies activations, when it is about to. `found` is all that it rounded."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.found: dict[str, Stored] = {}
        self._scratch = Scratch()
        self._read: Tensor | None = None  # several products read the same
        self._factor = torch.empty(0)

    def watch(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module`, whose linear layers from now on are rounded at their first call."""
        for name, linear in module.named_modules():
            if isinstance(linear, nn.Linear):
                linear.register_forward_pre_hook(functools.partial(self._before, f"{prefix}{name}.weight"))
        return module

    def _before(self, name: str, linear: nn.Linear, inputs: tuple[Tensor]) -> None:
        linear.weight = nn.Parameter(self.round(name, linear.weight, inputs[0]), requires_grad=False)

    def round(self, name: str, weight: Tensor, inputs: Tensor) -> Tensor:
        """The values, float32 [N,K], that `weight` has once it is rounded for `inputs` [tokens,K]."""
        refuse_non_finite(name, weight)
        if inputs is not self._read:
            self._read, self._factor = inputs, _factor(name, inputs)
        rounded = gptq(weight, self._factor, self.form)
        named = zip(self.form.parts(name), rounded, strict=True)
        self.found[name] = tuple(self._scratch.keep(part, tensor) for part, tensor in named)
        return dequantise(rounded, self.form)


def _factor(name: str, inputs: Tensor) -> Tensor:
    try:
        return inverse_factor(inputs.T @ inputs / len(inputs))
    except torch.linalg.LinAlgError as error:
        raise CheckpointError(
            f"{name} cannot be calibrated: what it multiplies exceeds float32; export without calibration, or check the "
            "checkpoint with 'headpool eval'"
        ) from error


def _with_rounded_embedding(weights: Weights, form: Form) -> Weights:
    """What layers read in the end, or close to it where the head is tied."""
    table = weights[EMBEDDING]
    rounded = ComputedTensor(EMBEDDING, torch.float32, table.shape, lambda: dequantise(quantise(table.read(), form), form))
    return {**weights, EMBEDDING: rounded}
