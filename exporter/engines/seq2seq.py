"""What every session of an encoder-decoder does alike: the input goes to the encoder, decoding begins with the start token.

A sequence's tokens are those of its input and those decoded since, so that a generation, a measurement at some context and a
score work as with a decoder: `lengths` counts both, `capacity` bounds both. The start token is not counted.
"""

from __future__ import annotations

import abc

import numpy as np

from exporter.engines.base import Session, SessionInfo
from exporter.engines.feeding import rectangles
from exporter.errors import EngineError
from exporter.seq2seq_config import Seq2SeqConfig


class Seq2SeqSession(Session):
    """B inputs encoded at once; all sequences have decoded equally many tokens."""

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, batch: int, capacity: int, info: SessionInfo) -> None:
        super().__init__(config, batch, capacity, info)
        self.rows = 0  # of the self-attention caches: the start token, and what has been decoded
        self.inputs = np.zeros(batch, np.int64)  # tokens of each encoder input

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        longest = max(map(len, prompts))
        (feed,) = rectangles(prompts, np.zeros(self.batch, np.int64), longest, longest)
        ends = feed.counts
        self._encode(feed.ids, (feed.positions < ends[:, None]).astype(np.int64))
        logits = self._step(np.full(self.batch, self.config.decoder_start_id, np.int64))
        self.rows, self.inputs = 1, ends
        self.lengths[:] = ends
        return logits

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        if not self.rows:
            raise EngineError("an encoder-decoder decodes after an input; give it one with prefill")
        logits = self._step(tokens)
        self.rows += 1
        self.lengths += 1
        return logits

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        if length == 0:
            self.rows = 0
            self.lengths[:] = 0
            self._forget()
            return
        left = length - self.inputs
        if (left < 0).any() or len(set(left)) > 1:
            raise EngineError(
                f"cannot rewind to {length} tokens: the inputs, of {sorted(set(self.inputs.tolist()))} tokens, stay whole, and "
                "all sequences in step"
            )
        self.rows = 1 + int(left[0])
        self.lengths[:] = length
        self._keep()

    def kv_bytes(self) -> int:
        return self._kv_token_bytes() * int(self.lengths.sum() + self.batch * (self.rows > 0))

    def check_prompts(self, prompts: list[np.ndarray]) -> None:
        for row, prompt in enumerate(prompts, 1):
            if prompt.ndim == 1 and len(prompt) > self.capacity:
                raise EngineError(
                    f"input {row} of the encoder has {len(prompt)} tokens, the capacity is {self.capacity}; raise --capacity"
                )
        if self.rows:
            raise EngineError("an encoder-decoder reads its input at once; reset the session before the next input")
        super().check_prompts(prompts)

    @abc.abstractmethod
    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Read the inputs, int64 [B,E], and keep what cross-attention reads of them."""

    @abc.abstractmethod
    def _step(self, tokens: np.ndarray) -> np.ndarray:
        """The decoder on one token a sequence, at row `self.rows`: float32 logits [B,V]."""

    @abc.abstractmethod
    def _keep(self) -> None:
        """Only the first `self.rows` rows count from now on."""

    @abc.abstractmethod
    def _forget(self) -> None:
        """Nothing counts from now on."""
