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
class Block:
    """Channels of heads [n,D,e] that may be mixed with the same ones of other heads: `one`; where they turn with the position,
    `other` are their partners, and each pair is one complex channel."""

    one: slice
    other: slice | None = None

    def of(self, heads: Tensor) -> Tensor:
        """[n,D,e] → [frequencies, n, 1, e] complex, or of channels that do not turn [1, n, r, e]."""
        if self.other is None:
            return heads[None, :, self.one]
        return torch.complex(heads[:, self.one], heads[:, self.other]).transpose(0, 1)[:, :, None]

    def put(self, found: Tensor, heads: Tensor) -> None:
        """What `of` gives, back into `heads`."""
        if self.other is None:
            heads[:, self.one] = found[0]
        else:
            pairs = found[:, :, 0].transpose(0, 1)
            heads[:, self.one], heads[:, self.other] = pairs.real, pairs.imag


def blocks_of(size: int, rotary_dim: int) -> list[Block]:
    """Of heads of `size` channels, the first `rotary_dim` of which turn in half-split pairs (i, i + rotary_dim / 2). A block
    has AT_ONCE pairs at most: all of a large model's at a time would be gigabytes."""
    half = rotary_dim // 2
    ends = [(start, min(start + AT_ONCE, half)) for start in range(0, half, AT_ONCE)]
    found = [Block(slice(start, end), slice(half + start, half + end)) for start, end in ends]
    return [*found, Block(slice(rotary_dim, size))] if rotary_dim < size else found


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
    asking = moments if layer.asking is None else layer.asking
    key, query = torch.empty_like(layer.key[:G]), torch.empty_like(layer.query)
    for block in blocks_of(key.shape[1], rotary_dim):
        keys, queries = (block.of(heads).unflatten(1, (G, layer.kv_heads // G, -1)) for heads in (layer.key, layer.query))
        shared, basis = sharing(keys.squeeze(3), query_weights(queries, asking), moments)
        block.put(shared, key)
        block.put((basis.mH[..., None, :, :] @ queries).flatten(1, 3), query)
    return key, query


def query_weights(queries: Tensor, moments: Tensor) -> Tensor:
    """Queries [..., R, r, e] → [..., r, r]: the second moments of what the R query heads ask of one key head."""
    return gram(queries, moments).sum(-3)


def output_weights(output: Tensor) -> Tensor:
    """W_O of R query heads, [..., R, d, Dv] → [..., Dv, Dv]."""
    return (output.mH @ output).sum(-3)
