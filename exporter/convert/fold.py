"""One layer's KV heads shared group by group, and the maps from the shared heads folded into W_Q and W_O.

K_g ≈ A_g K̃ makes q · K_g a = (A_gᴴ q) · K̃ a: exact under RoPE where A_g is one complex scalar a frequency. V_g ≈ B_g Ṽ makes
W_O,h V_g = (W_O,h B_g) Ṽ. What comes out is plain grouped-query attention.

Through the gates of GLU attention nothing of V folds but a permutation of its channels and their scales (gated.py).

QK-norm lets no map of K through to W_Q: there the keys of a group are averaged before their norm, and V alone is folded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.gated import matched
from exporter.convert.sharing import Sharing, averaged, gram, leading

AT_ONCE = 8  # rotary frequencies


@dataclass(frozen=True)
class Blocks:
    """Heads taken apart into what may be mixed: `pairs` complex [D_rot/2, heads, 1, e], `rest` real [heads, D − D_rot, e]."""

    pairs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, heads: Tensor, rotary_dim: int) -> Blocks:
        """Heads [n, D, e] whose first `rotary_dim` channels rotate in half-split pairs (i, i + rotary_dim / 2)."""
        half = rotary_dim // 2
        pairs = torch.complex(heads[:, :half], heads[:, half:rotary_dim])
        return cls(pairs.transpose(0, 1)[:, :, None], heads[:, rotary_dim:])

    def join(self) -> Tensor:
        pairs = self.pairs[:, :, 0].transpose(0, 1)
        return torch.cat([pairs.real, pairs.imag, self.rest], dim=1)


def rotating(config: ModelConfig) -> int:
    """How many of the D channels of a key turn with its position."""
    return 0 if config.rope.kind == "none" else config.rotary_dim


def fold(
    layer: AttentionWeights, kv_heads: int, rotary_dim: int, sharing: Sharing, moments: Tensor, value_dim: int | None = None
) -> AttentionWeights:
    """`layer` with its L KV heads shared in `kv_heads` runs of L / kv_heads, and values of `value_dim` channels (None: Dv).

    moments [e, e] are the second moments of the layer's inputs; query heads weigh K by what they read of it, W_O weighs V.
    """
    G, m = kv_heads, layer.kv_heads // kv_heads
    key, query = layer.key, layer.query
    if m > 1:
        key, query = _fold_keys(layer, G, rotary_dim, sharing if layer.norms is None else averaged, moments)
    output = layer.output.permute(1, 0, 2).unflatten(0, (G, m, -1))  # [G,m,R,d,Dv]
    values, gate = layer.value.unflatten(0, (G, m)), None
    if value_dim is not None:
        value, basis = leading(values, output_weights(output), moments, value_dim)
    elif layer.gate is None:
        value, basis = sharing(values, output_weights(output), moments)
    else:
        value, gate, basis = matched(values, layer.gate.unflatten(0, (G, m)), moments)
    output = (output @ basis[:, :, None]).flatten(0, 2).permute(1, 0, 2)
    return AttentionWeights(query, key, value, output, layer.norms, gate=gate)


def _fold_keys(layer: AttentionWeights, G: int, rotary_dim: int, sharing: Sharing, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The G shared keys [G,D,e], and the queries [H,D,e] that read them."""
    keys, queries = Blocks.of(layer.key, rotary_dim), Blocks.of(layer.query, rotary_dim)
    asking = moments if layer.asking is None else layer.asking
    pairs, pair_queries = _share(keys.pairs, queries.pairs, G, sharing, moments, asking)
    (rest,), (rest_queries,) = _share(keys.rest[None], queries.rest[None], G, sharing, moments, asking)
    return Blocks(pairs, rest).join(), Blocks(pair_queries, rest_queries).join()


def _share(keys: Tensor, queries: Tensor, G: int, sharing: Sharing, moments: Tensor, asking: Tensor) -> tuple[Tensor, Tensor]:
    """keys [n, G·m, r, e] and queries [n, H, r, e] → [n, G, r, e] and the queries that read them; all n at a time would be
    too much memory."""
    if keys.shape[2] == 0 or keys.shape[0] == 0:
        return keys[:, :G], queries
    found = []
    for some_keys, some_queries in zip(keys.split(AT_ONCE), queries.split(AT_ONCE), strict=True):
        grouped = some_queries.unflatten(1, (G, keys.shape[1] // G, -1))
        shared, basis = sharing(some_keys.unflatten(1, grouped.shape[1:3]), query_weights(grouped, asking), moments)
        found.append((shared, (basis.mH[..., None, :, :] @ grouped).flatten(1, 3)))
    return torch.cat([shared for shared, _ in found]), torch.cat([folded for _, folded in found])


def query_weights(queries: Tensor, moments: Tensor) -> Tensor:
    """Queries [..., R, r, e] → [..., r, r]: the second moments of what the R query heads ask of one key head."""
    return gram(queries, moments).sum(-3)


def output_weights(output: Tensor) -> Tensor:
    """W_O of R query heads, [..., R, d, Dv] → [..., Dv, Dv]."""
    return (output.mH @ output).sum(-3)
