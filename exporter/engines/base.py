"""What every backend's session is: prefill, decode, reset, over one batch of sequences.

Only this interface is known to `headpool run`, `eval` and everything in `profiles`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

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

    def reset(self) -> None:
        """Forget everything; buffers stay."""
        self.rewind(0)

    def close(self) -> None:  # noqa: B027  most backends free with the object
        """Free what the backend holds."""

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
            if prompt.ndim != 1 or len(prompt) == 0:
                raise EngineError(f"prompt {row} has no tokens")
            self.check_tokens(prompt)
            if (need := int(self.lengths[row]) + len(prompt)) > self.capacity:
                raise EngineError(f"prompt {row} needs {need} cache rows, the capacity is {self.capacity}; raise --capacity")

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Refuse ids outside the vocabulary (a gather would read past the embedding)."""
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise EngineError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
