"""What every backend's session is: prefill, decode, reset, over one batch of sequences.

Only this interface is known to `headpool run`, `eval` and everything in `profiles`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from exporter.config import ModelConfig
from exporter.errors import EngineError


@dataclass(frozen=True)
class SessionInfo:
    """What a measurement has to name besides its numbers."""

    backend: str  # "onnxruntime", "torch", …
    provider: str  # "CPUExecutionProvider", "cpu", …
    versions: dict[str, str]
    options: dict[str, Any]  # threads, graph optimisation level, …


class Session(abc.ABC):
    """B sequences in step, each with a length of its own, over one KV cache of `capacity` tokens a sequence.

    `lengths[b]` is how many tokens of sequence b are in the cache. Token ids are int64; logits are float32 [B, V] for the
    newest token of each sequence. They are valid until the next call.
    """

    config: ModelConfig
    batch: int
    capacity: int
    info: SessionInfo

    def __init__(self, config: ModelConfig, batch: int, capacity: int, info: SessionInfo) -> None:
        self.config, self.batch, self.capacity, self.info = config, batch, capacity, info
        self.lengths = np.zeros(batch, dtype=np.int64)

    @abc.abstractmethod
    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        """Feed B prompts (1-D int64, any non-zero lengths) after what is in the cache; logits [B, V] of each one's last token.

        Long prompts are fed in chunks. Raises EngineError when a token is out of range or the capacity is exceeded; then
        nothing has been fed.
        """

    @abc.abstractmethod
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Feed one token a sequence (int64 [B]); logits [B, V]. The hot path: checks cost microseconds."""

    @abc.abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of every sequence (each must hold at least that many)."""

    def score(self, tokens: np.ndarray, skip: int = 0) -> Iterator[np.ndarray]:
        """Feed B sequences of n tokens (int64 [B, n]) after what is in the cache; logits of positions skip … n−1, in order.

        Yields float32 [B, t, V], some positions at a time, valid until the next item. This one works on every session: it
        prefills skip + 1 tokens and feeds the others one by one, which is the very path that decoding takes.
        """
        check_score(tokens, skip)
        self.check_prompts(list(tokens))
        yield self.prefill(list(tokens[:, : skip + 1]))[:, None]
        for column in tokens.T[skip + 1 :]:
            yield self.decode(column)[:, None]

    def reset(self) -> None:
        """Forget everything; buffers stay."""
        self.rewind(0)

    def close(self) -> None:  # noqa: B027  most backends free with the object
        """Free what the backend holds; the session cannot be used after it. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def kv_bytes(self) -> int:
        """Bytes the tokens now in the cache take (not the capacity), all sequences."""
        return self._kv_token_bytes() * int(self.lengths.sum())

    @abc.abstractmethod
    def _kv_token_bytes(self) -> int:
        """Bytes of K and V of one token of one sequence in the cache's dtype."""

    def check_prompts(self, prompts: list[np.ndarray]) -> None:
        """Refuse prompts that do not fit this session."""
        if len(prompts) != self.batch:
            raise EngineError(f"{len(prompts)} prompts for a session of batch {self.batch}")
        for row, prompt in enumerate(prompts):
            name = f"prompt {row + 1}" if self.batch > 1 else "the prompt"
            if prompt.ndim != 1 or len(prompt) == 0:
                raise EngineError(f"{name} has no tokens")
            self.check_tokens(prompt)
            if (need := int(self.lengths[row]) + len(prompt)) > self.capacity:
                raise EngineError(f"{name} needs {need} cache rows, the capacity is {self.capacity}; raise --capacity")

    def check_decode(self, tokens: np.ndarray) -> None:
        """Refuse tokens of another shape than [B], outside the vocabulary, or past the capacity."""
        if tokens.shape != (self.batch,):
            raise EngineError(f"decode takes {self.batch} tokens, one a sequence, got an array of shape {list(tokens.shape)}")
        self.check_tokens(tokens)
        if self.lengths.max() >= self.capacity:
            raise EngineError(f"the cache is full: {self.capacity} tokens a sequence; raise --capacity")

    def check_rewind(self, length: int) -> None:
        """Refuse a length that some sequence does not have."""
        if not 0 <= length <= (shortest := int(self.lengths.min())):
            raise EngineError(f"cannot rewind to {length} tokens: the shortest sequence holds {shortest}")

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Refuse ids outside the vocabulary (a gather would read past the embedding)."""
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise EngineError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")


def check_score(tokens: np.ndarray, skip: int) -> None:
    """Refuse what `Session.score` cannot take."""
    if tokens.ndim != 2:
        raise EngineError(f"score takes tokens of shape [batch, length], got {list(tokens.shape)}")
    if not 0 <= skip < tokens.shape[1]:
        raise EngineError(f"score cannot skip {skip} of {tokens.shape[1]} tokens")
