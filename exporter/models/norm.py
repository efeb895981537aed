"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) and LayerNorm, with Gemma's 1 + w."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.config import ModelConfig


class Norm(nn.Module):
    """x [·, size] → [·, size]. LayerNorm has a bias, RMSNorm none; `norm_offset` multiplies by 1 + weight."""

    def __init__(self, config: ModelConfig, size: int, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind or config.norm
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.zeros(size) if self.offset else torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.offset else self.weight
        if self.kind == "layer":
            return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)
