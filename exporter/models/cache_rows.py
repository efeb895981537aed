"""Caches stored in a form of graphs/caches.py under eager torch: rows rounded as they are written, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from graphs.caches import SCALE_BYTES

STORED = {"fp16": torch.float16, "int8": torch.int8}
LEAST = 2.0**-126  # a smaller scale would have fewer digits


def store(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [..., D] → as a cache of `dtype` has them: [..., D + 4] of int8, else [..., D]."""
    if dtype != torch.int8:
        return rows.to(dtype)
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(rows.isfinite().all(-1, keepdim=True), torch.where(scale < LEAST, 0.0, scale), torch.nan)
    q = torch.where(scale > 0, (rows / scale).round(), 0.0)
    return torch.cat([q.to(torch.int8), scale.contiguous().view(torch.int8)], dim=-1)


def load(cache: Tensor) -> Tensor:
    """The rows of a cache in float32, [..., D]."""
    if cache.dtype != torch.int8:
        return cache.float()
    size = cache.shape[-1] - SCALE_BYTES
    scale = cache[..., size:].contiguous().view(torch.float32)
    return cache[..., :size].float() * scale
