"""Text → one file of tokens, and the file → batches. Which windows a step reads follows from the seed and its number alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.errors import UserError
from exporter.tokenizer import Tokenizer
from exporter.uptrain.sources import Piece

DTYPE = np.dtype("<u4")
AT_ONCE = 64  # pieces that are tokenized together, in threads

Progress = Callable[[int], None]  # tokens so far


def write_tokens(
    path: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, vocab_size: int, end: int | None, limit: int, progress: Progress
) -> int:
    """Write up to `limit` tokens of `pieces` to the new file `path`, `end` behind each document; how many they were.

    Raises UserError for a token that the model's vocabulary has not.
    """
    written = 0
    with open(path, "wb") as file:
        for tokens in _tokenized(pieces, tokenizer, end):
            if tokens.size and tokens.max() >= vocab_size:
                raise UserError(f"{tokenizer.name} makes token {tokens.max()}, the model's vocabulary ends at {vocab_size - 1}")
            file.write(tokens[: limit - written].astype(DTYPE).tobytes())
            written = min(limit, written + tokens.size)
            progress(written)
            if written == limit:
                break
    return written


def _tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer, end: int | None) -> Iterator[np.ndarray]:
    for group in _groups(pieces):
        encoded = tokenizer.core.encode_batch([text for text, _ in group], add_special_tokens=False)
        for (_, ends), tokens in zip(group, encoded, strict=True):
            yield np.array([*tokens.ids, *([end] if ends and end is not None else [])], np.int64)


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == AT_ONCE:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True, eq=False)
class Windows:
    """A file of tokens as windows of `window` + 1, each sharing its last token with the next one's first.

    The first `held_out` are never trained on. The rest are read in an order drawn anew for each pass.
    """

    tokens: np.ndarray  # a file mapped into memory
    window: int
    held_out: int
    seed: int

    @classmethod
    def open(cls, path: Path, window: int, held_out: int, seed: int) -> Windows:
        """Raises UserError where the tokens are not enough for one window to train on."""
        count = path.stat().st_size // DTYPE.itemsize
        if (need := (held_out + 1) * window + 1) > count:
            tokens = f"{count} token{'s' * (count != 1)}"
            raise UserError(
                f"the data has {tokens}, at least {need} are needed: {held_out} held-out windows and one to train on, of "
                f"{window} tokens each; give more text, a shorter window or fewer held out"
            )
        return cls(np.memmap(path, DTYPE, "r"), window, held_out, seed)

    @property
    def count(self) -> int:
        """Windows to train on."""
        return (len(self.tokens) - 1) // self.window - self.held_out

    def held(self) -> np.ndarray:
        """int64 [held_out, window + 1]."""
        return self._read(np.arange(self.held_out))

    def batch(self, step: int, size: int) -> np.ndarray:
        """int64 [size, window + 1]: what `step` (from 0) reads."""
        places = np.arange(step * size, (step + 1) * size)
        turns = places // self.count
        numbers = np.empty_like(places)
        for turn in range(int(turns[0]), int(turns[-1]) + 1):
            numbers[turns == turn] = _order(self.seed, turn, self.count)[places[turns == turn] % self.count]
        return self._read(self.held_out + numbers)

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        rows = numbers[:, None] * self.window + np.arange(self.window + 1)
        return self.tokens[rows].astype(np.int64)


@functools.lru_cache(maxsize=1)  # that of the pass that steps are in
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    """In which the `count` windows are read in pass `turn`."""
    return np.random.default_rng((seed, turn)).permutation(count)
