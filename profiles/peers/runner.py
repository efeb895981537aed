"""What a runtime has to do to be measured: feed tokens, forget tokens. One subclass a runtime, in `with_*.py`."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy as np


class Runner(abc.ABC):
    """B sequences in step over one model, opened in the constructor: `Runner(model, batch, capacity, threads, **options)`.

    model     what the module's `export` has made
    capacity  tokens of a sequence, at the most
    threads   of every operator
    """

    versions: dict[str, str]
    options: dict[str, Any]  # what figures have to name: settings that differ from the runtime's defaults
    slack: float = 0.0  # where to forget is dear: the share of its length that a sequence outgrows before steps make it

    @abc.abstractmethod
    def __init__(self, model: Path, batch: int, capacity: int, threads: int, **options: Any) -> None: ...

    @abc.abstractmethod
    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Add tokens (int64 [B, T]) to the sequences; float32 logits [B, V] of the last ones, valid until the next call."""

    @abc.abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of every sequence; what that takes is in no sample."""
