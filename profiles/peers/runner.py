"""What a runtime has to do to be measured: feed tokens, forget tokens. One subclass a runtime, in `with_*.py`."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy as np


class Runner(abc.ABC):
    """One sequence over one model, opened in the constructor: `Runner(model, capacity, threads, **options)`.

    model     what the module's `export` has made
    capacity  tokens of the sequence, at the most
    threads   of every operator
    """

    versions: dict[str, str]
    options: dict[str, Any]  # what figures have to name: settings that differ from the runtime's defaults

    @abc.abstractmethod
    def __init__(self, model: Path, capacity: int, threads: int, **options: Any) -> None: ...

    @abc.abstractmethod
    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Add tokens (int64 [T]) to the sequence; float32 logits [V] of the last one, valid until the next call."""

    @abc.abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; what that takes is in no sample."""
