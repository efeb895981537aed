"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding that keeps what a linear layer gives, not its weights.

For inputs x of second moments H = E[x xᵀ], columns of W [N,K] are rounded one by one, and what each moves is made good in the
columns that are left. With H⁻¹ = Uᵀ U, U upper triangular (the paper's Cholesky form, step 3), column i that became ŵ changes
column j > i by −(w_i − ŵ) U_ij / U_ii. The forms are those of blocks.py. The scales of a block are found when its turn comes:
of those of the nearest and somewhat smaller ones, which cut its largest values, what gives the least Σ (w_i − ŵ)² / U_ii².

Written here because no library gives just this step. onnxruntime.quantization's takes an ONNX model with its weights inside,
rounds its own result once more and leaves out Gemm and Gather; gptqmodel, llm-compressor, auto-round and torchao take models of
transformers whole, most of them on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.quantise.blocks import Parts, fit, levels, pack
from graphs.quantise import Form

DAMPING = 0.05  # of the mean second moment, added to all; the paper's 0.01 is for sixty times as many tokens
SHARES = torch.arange(0.6, 1.075, 0.05).tolist()  # of the nearest's scales


def inverse_factor(moments: Tensor) -> Tensor:
    """U [K,K] of H, which is damped in place. Raises torch.linalg.LinAlgError where H is no matrix of moments, NaN and all.

    H = V Vᵀ with V upper triangular, a Cholesky decomposition from the last row up; U is its inverse.
    """
    diagonal = moments.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=torch.finfo(moments.dtype).tiny / DAMPING)  # inputs may all be zero
    V = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(V, torch.eye(len(V), dtype=V.dtype), upper=True)


def gptq(weight: Tensor, factor: Tensor, form: Form) -> Parts:
    """[N,K] and `inverse_factor` [K,K] of what it multiplies → what `quantise` of blocks.py gives."""
    N, K = weight.shape
    block = form.block_of(K)
    columns = weight.float().T.contiguous()  # [K,N], changed as columns before are rounded
    q = torch.empty(N, K // block, block, dtype=torch.uint8)
    scales, zeros = torch.empty(N, K // block), torch.empty(N, K // block)
    for index in range(K // block):
        own, rest = slice(index * block, (index + 1) * block), slice((index + 1) * block, None)
        scale, zero = _fit(columns[own], factor[own, own], form)
        numbers, errors = _block(columns[own], factor[own, own], scale, zero, form)
        columns[rest] -= factor[own, rest].T @ errors
        q[:, index], scales[:, index], zeros[:, index] = numbers.T, scale, zero
    return pack(q, scales, zeros, form)


def _fit(columns: Tensor, factor: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Columns [B,N] and their part of U → the block's scale and zero [N]."""
    blocks = columns.T.unsqueeze(1)
    largest, zeros = fit(blocks, form)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in SHARES:
        scales = largest * share
        moved = (levels(blocks, scales, zeros, form) - zeros) * scales - blocks
        error = (moved / factor.diagonal()).square().sum(2, keepdim=True)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best.flatten(), zeros.flatten()


def _block(columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Columns [B,N], which are changed, their part of U, and their scale and zero [N] → q and (w − ŵ) / U_ii, both [B,N]."""
    numbers, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, column in enumerate(columns):
        numbers[i] = levels(column, scale, zero, form)
        errors[i] = (column - (numbers[i] - zero) * scale) / factor[i, i]
        columns[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return numbers, errors
