"""Matrices in blocks of integers that share a scale, rounded to the nearest: what graphs/quantise.py has a graph read.

Without zeros, the scale of a block is its value of largest magnitude over −2^(bits−1), so that this value, whatever its sign,
is met exactly and every level has a use, as in llama.cpp's Q4_0. With a zero, the levels span the block and 0, which is met
exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphs.quantise import Form

Parts = tuple[Tensor, ...]  # q, scales, and zeros where the form has them


def quantise(weight: Tensor, form: Form) -> Parts:
    """[N,K] → tensors of `form.shapes(N, K)`: uint8, the scales float32."""
    N, K = weight.shape
    blocks = weight.float().reshape(N, -1, form.block_of(K))
    scales, zeros = fit(blocks, form)
    return pack(levels(blocks, scales, zeros, form), scales.squeeze(2), zeros.squeeze(2), form)


def dequantise(parts: Parts, form: Form) -> Tensor:
    """What `quantise` gave → float32 [N,K]."""
    q, scales = parts[:2]
    zeros = _unpacked(parts[2], form)[:, : scales.shape[1]].unsqueeze(2) if form.zeros else form.middle
    return ((_unpacked(q, form) - zeros) * scales.unsqueeze(2)).flatten(1)


def fit(blocks: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """float32 [·,·,B] → scale and zero of each block [·,·,1]; the zeros are whole numbers, in float32."""
    if not form.zeros:
        scales = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True)) / -form.middle
        return scales, torch.full_like(scales, form.middle)
    low, high = (blocks.amin(2, keepdim=True).clamp(max=0), blocks.amax(2, keepdim=True).clamp(min=0))
    scales = (high - low) / (2 * form.middle - 1)
    return scales, (-low / _safe(scales)).round()


def levels(values: Tensor, scales: Tensor, zeros: Tensor, form: Form) -> Tensor:
    """The q whose (q − zero) · scale is nearest: whole numbers, in float32."""
    return (values / _safe(scales)).round().add(zeros).clamp(0, 2 * form.middle - 1)


def pack(q: Tensor, scales: Tensor, zeros: Tensor, form: Form) -> Parts:
    """`levels` of blocks [N,·,B], their scales and zeros [N,·] → what `quantise` gives."""
    return (_packed(q, form), scales.contiguous(), _packed(zeros, form))[: 2 + form.zeros]


def _safe(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 1, scales)  # of a block of zeros


def _packed(numbers: Tensor, form: Form) -> Tensor:
    """As uint8; of 4 bits two in a byte along the last dimension, the first in the low half."""
    q = numbers.to(torch.uint8)
    if form.bits == 4:
        q = torch.nn.functional.pad(q, (0, q.shape[-1] % 2))
        q = q[..., 0::2] | q[..., 1::2] << 4
    return q.contiguous()


def _unpacked(q: Tensor, form: Form) -> Tensor:
    return (torch.stack((q & 15, q >> 4), dim=-1).flatten(-2) if form.bits == 4 else q).float()
