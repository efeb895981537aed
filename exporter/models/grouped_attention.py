"""`headpool::grouped_attention` as a torch operator: the eager reference of the canonical ONNX node and its translation.

Eager torch, the tests and the exported graph share this one definition; what it computes is written in graphs/canonical.py.
"""

from __future__ import annotations

from typing import Any

import onnxscript
import torch
from torch import Tensor, library

from exporter.models.cache_rows import load, store
from graphs import canonical


@library.custom_op("headpool::grouped_attention", mutates_args=())
def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention (Ainslie et al. 2023, section 2.2) over a static or a concat cache; see graphs/canonical.py.

    Computes in float32 whatever the dtype. query [B,T,H·D] → output [B,T,H·Dv] and the two present caches. Static caches may
    be stored in a form of graphs/caches.py.
    """
    B, T, _ = query.shape
    G = kv_num_heads
    key_BGTD = key.view(B, T, G, -1).transpose(1, 2)
    value_BGTD = value.view(B, T, G, -1).transpose(1, 2)
    if position_ids is not None:
        rows_BT = position_ids[:, :1] + torch.arange(T, device=query.device)
        present_key = _scatter_rows(past_key, key_BGTD, rows_BT)
        present_value = _scatter_rows(past_value, value_BGTD, rows_BT)
        seen_BTS = torch.arange(past_key.shape[2], device=query.device) <= position_ids[:, :, None]
    else:
        assert attention_mask is not None
        present_key = torch.cat([past_key, key_BGTD], dim=2)
        present_value = torch.cat([past_value, value_BGTD], dim=2)
        total = present_key.shape[2]
        last_T1 = torch.arange(total - T, total, device=query.device)[:, None]
        seen_BTS = (torch.arange(total, device=query.device) <= last_T1) & (attention_mask != 0)[:, None, :]
    output = _attend(query, present_key, present_value, seen_BTS, bias, num_heads, scale)
    return output, present_key, present_value


@library.custom_op("headpool::read_attention", mutates_args=())
def read_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    bias: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> Tensor:
    """Attention that adds nothing to what it reads: key [B,G,S,D], value [B,G,S,Dv], all rows that attention_mask [B,S] keeps.

    The same canonical node as `grouped_attention`, without new keys and values. query [B,T,H·D] → output [B,T,H·Dv].
    """
    del kv_num_heads
    seen_BTS = (attention_mask != 0)[:, None, :].expand(-1, query.shape[1], -1)
    return _attend(query, key, value, seen_BTS, bias, num_heads, scale)


def _attend(
    query: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, seen_BTS: Tensor, bias_BHTS: Tensor | None, H: int, scale: float
) -> Tensor:
    (B, T, _), G = query.shape, key_BGSD.shape[1]
    query_BGRTD = query.view(B, T, G, H // G, -1).permute(0, 2, 3, 1, 4)
    scores = torch.einsum("bgrtd,bgsd->bgrts", query_BGRTD.float(), load(key_BGSD)) * scale
    if bias_BHTS is not None:
        scores = scores + bias_BHTS.float().unflatten(1, (G, H // G))
    scores = scores.masked_fill(~seen_BTS[:, None, None], torch.finfo(torch.float32).min / 2)
    output = torch.einsum("bgrts,bgsd->btgrd", scores.softmax(-1), load(value_BGSD))
    return output.reshape(B, T, -1).to(query.dtype)


def _scatter_rows(past_BGSD: Tensor, new_BGTD: Tensor, rows_BT: Tensor) -> Tensor:
    present = past_BGSD.clone()
    batch = torch.arange(past_BGSD.shape[0], device=past_BGSD.device)[:, None]
    present[batch, :, rows_BT] = store(new_BGTD, past_BGSD.dtype).transpose(1, 2)
    return present


@grouped_attention.register_fake
def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _ = query.shape
    output = query.new_empty(B, T, num_heads * past_value.shape[3])
    if position_ids is not None:
        return output, torch.empty_like(past_key), torch.empty_like(past_value)
    length = past_key.shape[2] + T
    key_shape = (*past_key.shape[:2], length, past_key.shape[3])
    value_shape = (*past_value.shape[:2], length, past_value.shape[3])
    return output, past_key.new_empty(key_shape), past_value.new_empty(value_shape)


@read_attention.register_fake
def _read_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    bias: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> Tensor:
    return query.new_empty(*query.shape[:2], num_heads * value.shape[3])


def onnx_translation() -> dict[Any, Any]:
    """What torch.onnx.export needs to write the operators as the canonical node."""
    opset = onnxscript.values.Opset(canonical.DOMAIN, canonical.VERSION)
    node = onnxscript.values.Op(opset, canonical.OP_TYPE, canonical.register())

    def grouped(*given: Any) -> Any:
        tensors, (num_heads, kv_num_heads, scale), bias = given[:7], given[7:10], given[10:]
        return node(*tensors, *bias, num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale)

    def read(query: Any, key: Any, value: Any, mask: Any, bias: Any, num_heads: Any, kv_num_heads: Any, scale: Any) -> Any:
        sizes = {"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale}
        output, _, _ = node(query, None, None, key, value, None, mask, bias, **sizes)
        return output

    return {
        torch.ops.headpool.grouped_attention.default: grouped,
        torch.ops.headpool.read_attention.default: read,
    }
