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
        if not self.offset:
            return self._normalise(x, self.weight, self.bias)
        # As Gemma does: 1 + w and all that follows in float32, rounded once. In bf16, 1 + w itself would lose most of w's bits.
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return self._normalise(x.to(wide), self.weight.to(wide) + 1, bias).to(x.dtype)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps)  # under autocast they differ
