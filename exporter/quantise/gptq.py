"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding that keeps what a linear layer gives, not its weights.

For inputs x of second moments H = E[x xᵀ], columns of W [N,K] are rounded one by one, and what each moves is made good in the
columns that are left. With H⁻¹ = Uᵀ U, U upper triangular (the paper's Cholesky form, step 3), column i that became ŵ changes
column j > i by −(w_i − ŵ) U_ij / U_ii. The format is that of blocks.py; a block's scales come from its columns as they are when
its turn comes. Where inputs do not correlate, U is diagonal and this is rounding to the nearest.

Written here because no library gives just this step. onnxruntime.quantization's takes an ONNX model with its weights inside,
rounds its own result once more and leaves out Gemm and Gather; gptqmodel, llm-compressor, auto-round and torchao take models of
transformers whole, most of them on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.quantise.blocks import levels, pack, scales_of
from graphs.quantise import BITS, BLOCK

DAMPING = 0.01  # of the mean second moment, added to all: what the paper uses


def inverse_factor(moments: Tensor) -> Tensor:
    """U [K,K] of H, which is damped in place. Raises torch.linalg.LinAlgError where H is no matrix of moments, NaN and all.

    H = V Vᵀ with V upper triangular, a Cholesky decomposition from the last row up; U is its inverse.
    """
    diagonal = moments.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=torch.finfo(moments.dtype).tiny / DAMPING)  # inputs may all be zero
    V = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(V, torch.eye(len(V), dtype=V.dtype), upper=True)


def gptq(weight: Tensor, factor: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[N,K] and `inverse_factor` [K,K] of what it multiplies → q and scales, as `quantise` of blocks.py gives them."""
    N, K = weight.shape
    columns = weight.float().T.contiguous()  # [K,N], changed as columns before are rounded
    q = torch.empty(N, K // BLOCK, BLOCK * BITS[kind] // 8, dtype=torch.uint8)
    scales = torch.empty(N, K // BLOCK)
    for index in range(K // BLOCK):
        own, rest = slice(index * BLOCK, (index + 1) * BLOCK), slice((index + 1) * BLOCK, None)
        numbers, scale, errors = _block(columns[own], factor[own, own], kind)
        columns[rest] -= factor[own, rest].T @ errors
        q[:, index : index + 1] = pack(numbers.T.unsqueeze(1), kind)
        scales[:, index] = scale
    return q, scales


def _block(columns: Tensor, factor: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [32,N], which are changed, and their part of U → levels [32,N], scales [N] and (w − ŵ) / U_ii [32,N]."""
    scale = scales_of(columns.T.unsqueeze(1), kind).flatten()
    numbers, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, column in enumerate(columns):
        numbers[i] = levels(column, scale, kind)
        errors[i] = (column - numbers[i] * scale) / factor[i, i]
        columns[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return numbers, scale, errors
