"""T5's relative positions (Raffel et al. 2020, arXiv 1910.10683, section 2.1): a number for each head and bucket of distances.

Small distances have a bucket each, larger ones share buckets that widen with the logarithm, and all from `max_distance` on
share the last. Which bucket a distance falls into is looked up in a table and not computed where it is used: at the edges of
the buckets the logarithms of two runtimes, one bit apart, would give two different buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from exporter.seq2seq_config import Seq2SeqConfig


def bucket_table(buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """int64 [2·max_distance + 1]: the bucket of row − query position, from −max_distance on.

    Bidirectional, half of the buckets are for rows after the query; else those count as distance 0.
    """
    relative = torch.arange(-max_distance, max_distance + 1)
    first = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        first, distance = (relative > 0) * buckets, relative.abs()
    else:
        distance = (-relative).clamp_min(0)
    exact = buckets // 2
    # In float32 and in this order, as T5's checkpoints were trained.
    widening = torch.log(distance.float().clamp_min(1) / exact) / math.log(max_distance / exact) * (buckets - exact)
    wide = (exact + widening.to(torch.int64)).clamp_max(buckets - 1)
    return first + torch.where(distance < exact, distance, wide)


class RelativeBias(nn.Module):
    """row − query position, int64 [..., T, S] → what is added to the scores of each head, [..., T, S, H]."""

    buckets: Tensor

    def __init__(self, config: Seq2SeqConfig, bidirectional: bool) -> None:
        super().__init__()
        self.max_distance = config.relative_max_distance
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.num_heads))
        table = bucket_table(config.relative_buckets, self.max_distance, bidirectional)
        self.register_buffer("buckets", table, persistent=False)

    def forward(self, relative: Tensor) -> Tensor:
        by_distance = nn.functional.embedding(self.buckets, self.weight)
        index = relative.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return nn.functional.embedding(index, by_distance)
