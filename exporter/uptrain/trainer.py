"""One model in training: a step, and the loss on the windows held out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from exporter.checkpoint import Checkpoint
from exporter.config import ModelConfig
from exporter.models.decoder import canonical_to_module
from exporter.models.rope import frequencies
from exporter.uptrain.adafactor import Adafactor
from exporter.uptrain.loss import loss
from exporter.uptrain.model import TrainedDecoder
from exporter.uptrain.options import UptrainOptions
from exporter.uptrain.processes import Processes, computes_in_bf16
from exporter.uptrain.tokens import Windows
from exporter.weights import LazyTensor, Weights

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1  # of AdamW; vectors do not decay
CLIP = 1.0  # the gradient's norm


class Trainer:
    """`source` in float32 as `model`, sharded over the processes of `group` where there are several; `teacher` likewise."""

    def __init__(
        self,
        source: Checkpoint,
        teacher: Checkpoint | None,
        windows: Windows,
        options: UptrainOptions,
        group: Processes,
    ) -> None:
        self.options, self.group, self.windows = options, group, windows
        self.share, self.micro = options.share(group.count)
        wanted = "bf16" if computes_in_bf16(group.device) else "fp32"
        self.dtype = options.dtype or wanted
        self.model = build(source.config, source.weights, group, options.checkpointing, options.train == "attention")
        self.teacher = build(teacher.config, teacher.weights, group).requires_grad_(False) if teacher else None
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.parameters, options)

    def step(self, number: int) -> dict[str, float]:
        """Train on step `number` (from 0): its figures; {}, and the weights as they were, where they are not finite."""
        start = time.perf_counter()
        rate = self.options.rate(number)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        first = self.group.rank * self.share
        rows = torch.from_numpy(self.windows.batch(number, self.options.batch)[first : first + self.share])
        figures = torch.zeros(4, device=self.group.device)
        for part in rows.split(self.micro):
            figures += self._backward(part.to(self.group.device), len(part) / self.share)
        total, cross_entropy, kl, hidden = self.group.mean(figures).tolist()
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, CLIP)).item()
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not finite:
            return {}
        tokens, seconds = self.options.batch * self.options.window, time.perf_counter() - start
        row: dict[str, float] = {"step": number + 1, "tokens": (number + 1) * tokens, "loss": total}
        if self.teacher is not None:
            row |= {"cross_entropy": cross_entropy, "kl": kl, "hidden": hidden}
        return row | {"lr": rate, "gradient_norm": norm, "seconds": seconds, "tokens_per_second": tokens / seconds}

    @torch.no_grad()
    def held_out(self) -> float:
        """Cross-entropy in nats a token of the windows held out."""
        held = self.windows.held()
        total = torch.zeros((), device=self.group.device)
        for turn in range(math.ceil(len(held) / self.group.count)):  # as many for each process: they compute together
            number = turn * self.group.count + self.group.rank
            ids = torch.from_numpy(held[min(number, len(held) - 1)][None]).to(self.group.device)
            with self._precision():
                output = self.model(ids[:, :-1])
            total += loss(output, ids[:, 1:], None, 0, 0).cross_entropy if number < len(held) else 0
        return self.group.mean(total).item() * self.group.count / len(held)

    def _backward(self, ids: Tensor, weight: float) -> Tensor:
        """Gradients of `ids` [B,T+1], added to what there are; total, cross-entropy, KL and hidden, all times `weight`."""
        with self._precision():
            student = self.model(ids[:, :-1])
            with torch.no_grad():
                teacher = self.teacher(ids[:, :-1]) if self.teacher is not None else None
        value = loss(student, ids[:, 1:], teacher, self.options.kl, self.options.hidden)
        (value.total * weight).backward()
        return torch.stack([value.total, value.cross_entropy, value.kl, value.hidden]).detach() * weight

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # No weight is used twice in a call, and the gathered ones of a shard must not be kept: no cache.
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.dtype == "bf16", cache_enabled=False)


def build(
    config: ModelConfig, weights: Weights, group: Processes, checkpointing: bool = False, attention_only: bool = False
) -> TrainedDecoder:
    """The model with `weights`, read a tensor at a time: each process keeps its shard."""
    with torch.device("meta"):
        model = TrainedDecoder(config, checkpointing)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not attention_only or ".self_attn." in name)
    if group.mesh is not None:
        for layer in model.layers:
            fully_shard(layer, mesh=group.mesh)
        fully_shard(model, mesh=group.mesh)
    model.to_empty(device=group.device)
    if model.prologue.rotary is not None:
        model.prologue.rotary.inv_freq = frequencies(config)[0].to(group.device)
    _fill(dict(model.named_parameters()), weights)
    return model


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], weights: Mapping[str, LazyTensor]) -> None:
    for name, lazy in weights.items():
        parameter = parameters[canonical_to_module(name)]
        tensor = lazy.read().to(parameter.device, torch.float32)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(tensor)


def _optimizer(parameters: list[nn.Parameter], options: UptrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adafactor":
        return Adafactor(parameters, lr=options.rate(0))
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.rate(0), betas=BETAS)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
