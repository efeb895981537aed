"""Matrices in blocks of integers that share a scale, rounded to the nearest: what graphs/quantise.py has a graph read.

Per block of 32 inputs the scale is the value of largest magnitude over −2^(bits−1), so that this value, whatever its sign, is
met exactly and every level has a use, as in llama.cpp's Q4_0; q = round(w / scale) + 2^(bits−1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphs.quantise import BITS, BLOCK


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[N,K] → q uint8 [N, K/32, 4·bits] and scales float32 [N, K/32]."""
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    scales = scales_of(blocks, kind)
    return pack(levels(blocks, scales, kind), kind), scales.squeeze(2)


def dequantise(q: Tensor, scales: Tensor, kind: str) -> Tensor:
    """What `quantise` gave → float32 [N,K]."""
    if kind == "int4":
        q = torch.stack((q & 15, q >> 4), dim=3).flatten(2)
    return ((q.float() - _middle(kind)) * scales.unsqueeze(2)).flatten(1)


def scales_of(blocks: Tensor, kind: str) -> Tensor:
    """float32 [·,·,32] → [·,·,1]."""
    places = blocks.abs().argmax(dim=2, keepdim=True)
    return blocks.gather(2, places) / -_middle(kind)


def levels(values: Tensor, scales: Tensor, kind: str) -> Tensor:
    """The nearest w / scale that there are: whole numbers from −2^(bits−1), in float32."""
    safe = torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 1, scales)  # of a block of zeros
    return (values / safe).round().clamp(-_middle(kind), _middle(kind) - 1)


def pack(numbers: Tensor, kind: str) -> Tensor:
    """`levels` of blocks [·,·,32] → their q, uint8."""
    q = numbers.add(_middle(kind)).to(torch.uint8)
    return (q[:, :, 0::2] | q[:, :, 1::2] << 4 if kind == "int4" else q).contiguous()


def _middle(kind: str) -> int:
    return 1 << (BITS[kind] - 1)
