"""How prompts of unequal lengths are cut into rectangular calls of a graph, for each cache form. Numpy only.

Letters: B batch, T new tokens of one call, P columns already in a concat cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PAD = 0  # any valid token: what it writes is overwritten or masked


@dataclass(frozen=True)
class Feed:
    """One call: input_ids and position_ids int64 [B, T], how many tokens of each row are real, and (concat) the mask [B, T]."""

    ids: np.ndarray
    positions: np.ndarray
    counts: np.ndarray
    mask: np.ndarray | None = None


def right_padded(prompts: list[np.ndarray], lengths: np.ndarray, capacity: int, chunk: int) -> Iterator[Feed]:
    """Calls for a static cache, where row b writes from cache row lengths[b] on and a token sees the rows up to its own.

    The pads of a row write after its end, where its next real token overwrites them before anything sees them. So that one
    last call gives every row's newest logits, prompts of unequal lengths keep their last token back for a call of T = 1.
    No pad is written past `capacity`: T shrinks near it (never when all sequences started together).
    """
    starts = lengths.copy()  # the caller counts on while it takes the calls
    ends = np.array([len(prompt) for prompt in prompts])
    if len(set(ends)) > 1:
        yield from rectangles([prompt[:-1] for prompt in prompts], starts, capacity, chunk)
        starts += ends - 1
        prompts = [prompt[-1:] for prompt in prompts]
    yield from rectangles(prompts, starts, capacity, chunk)


def rectangles(prompts: list[np.ndarray], starts: np.ndarray, capacity: int, chunk: int) -> Iterator[Feed]:
    """`prompts` from the positions `starts` on, at most `chunk` columns a call, padded on the right."""
    left = np.array([len(prompt) for prompt in prompts])
    done = np.zeros_like(left)
    while left.any():
        T = int(min(chunk, left.max(), capacity - starts.max()))
        ids = np.full((len(prompts), T), PAD, dtype=np.int64)
        counts = np.minimum(left, T)
        for row, (prompt, start, count) in enumerate(zip(prompts, done, counts, strict=True)):
            ids[row, :count] = prompt[start : start + count]
        yield Feed(ids, starts[:, None] + np.arange(T), counts)
        done, starts, left = done + counts, starts + counts, left - counts


def left_padded(prompts: list[np.ndarray], lengths: np.ndarray, chunk: int) -> Iterator[Feed]:
    """Calls for a concat cache, where new columns are appended for all rows alike and attention_mask hides the pads.

    Every prompt ends in the last column. Positions count the real tokens; a pad's position is clipped to 0 or repeats.
    """
    ends = np.array([len(prompt) for prompt in prompts])
    T = int(ends.max())
    ids = np.full((len(prompts), T), PAD, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = prompt
    mask = (np.arange(T) >= (T - ends)[:, None]).astype(np.int64)
    positions = np.maximum(lengths[:, None] + mask.cumsum(1) - 1, 0)
    for start in range(0, T, chunk):
        columns = slice(start, start + chunk)
        part = mask[:, columns]
        yield Feed(ids[:, columns], positions[:, columns], part.sum(1), part)
