"""What the two cache forms of an ONNX Runtime session share: I/O bindings, the order of calls, counts and logits.

Decoding reuses one binding whose token, position and logits buffers stay where they are; prefill makes one a call.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime

from exporter.bundle import Variant
from exporter.engines.base import Session, SessionInfo, check_score
from exporter.engines.feeding import Feed
from exporter.engines.providers import PROVIDERS
from exporter.errors import EngineError

ELEMENT_TYPES = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
    "int8": onnx.TensorProto.INT8,
}
# numpy has no bfloat16 of its own; buffers hold its bits as float16 and are bound by address with the right element type.
STORAGE = {"fp32": np.float32, "fp16": np.float16, "bf16": np.float16, "int8": np.int8}


class _Indices:
    """An int64 input: `array` on the host, which `push` makes the runtime see."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        self.array = np.zeros(shape, np.int64)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self.array, device, 0)
        self.device = device

    def push(self) -> None:
        if self.device != "cpu":  # on the host the value lies on the array itself
            self.value.update_inplace(self.array)


class Scores:
    """Where a binding puts its logits on the host, [B, rows, V]."""

    def __init__(self, binding: Any, dtype: str, shape: tuple[int, int, int]) -> None:
        self.array, self.dtype = np.zeros(shape, STORAGE[dtype]), dtype
        binding.bind_output("logits", "cpu", 0, ELEMENT_TYPES[dtype], shape, self.array.ctypes.data)

    def read(self) -> np.ndarray:
        """As float32; for an fp32 graph the very buffer, no copy."""
        logits = self.array.view(ml_dtypes.bfloat16) if self.dtype == "bf16" else self.array
        return logits.astype(np.float32, copy=False)


def run(runtime: Any, binding: Any) -> None:
    """One call. Raises EngineError."""
    try:
        runtime.run_with_iobinding(binding)
    except RuntimeError as error:  # memory that ran out, above all
        raise EngineError(f"onnxruntime failed in a step: {' '.join(str(error).split())[:300]}") from None


class Call:
    """One I/O binding with its token, position and logits buffers for [B, T]; T = 1 is kept for every decode step."""

    def __init__(self, session: OrtSession, T: int) -> None:
        self.binding = session.runtime.io_binding()
        self.ids, self.positions = (_Indices((session.batch, T), session.device) for _ in range(2))
        self.binding.bind_ortvalue_input("input_ids", self.ids.value)
        self.binding.bind_ortvalue_input("position_ids", self.positions.value)
        rows = 1 if session.variant.logits == "last" else T
        self.logits = Scores(self.binding, session.variant.dtype, (session.batch, rows, session.config.vocab_size))

    def run(self, runtime: Any) -> None:
        self.ids.push()
        self.positions.push()
        run(runtime, self.binding)


class OrtSession(Session):
    """What both cache forms share: the order of calls, the counts and the logits."""

    def __init__(self, runtime: Any, variant: Variant, batch: int, capacity: int, info: SessionInfo) -> None:
        super().__init__(variant.config, batch, capacity, info)
        self.runtime, self.variant, self.provider = runtime, variant, PROVIDERS[info.provider]
        self.device = self.provider.device
        self.chunk: int = info.options["chunk"]
        self.profile: Path | None = None  # where the runtime wrote its profile, after close()
        self._step = Call(self, 1)

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        if self._one_by_one(max(map(len, prompts))):
            return self._prefill_rows(prompts)
        for feed in self._plan(prompts):
            logits = self._feed(feed)
        return logits[:, -1]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        step = self._step
        step.ids.array[:, 0] = tokens
        step.positions.array[:, 0] = self.lengths
        self._run(step, None)
        self.lengths += 1
        return step.logits.read()[:, 0]

    def score(self, tokens: np.ndarray, skip: int = 0) -> Iterator[np.ndarray]:
        if self.variant.logits != "all" or self._one_by_one(tokens.shape[-1]):
            yield from super().score(tokens, skip)
            return
        check_score(tokens, skip)
        self.check_prompts(list(tokens))
        seen = 0
        for feed in self._plan(list(tokens)):
            logits = self._feed(feed)
            if seen + logits.shape[1] > skip:
                yield logits[:, max(skip - seen, 0) :]
            seen += logits.shape[1]

    def close(self) -> None:
        if self.runtime is None:
            return
        if self.runtime.get_session_options().enable_profiling:
            self.profile = Path(self.runtime.end_profiling())
        self._release()
        del self._step
        self.runtime = None

    def _feed(self, feed: Feed) -> np.ndarray:
        """Run one call of a prefill; float32 logits [B, 1 or T, V]."""
        call = self._step if feed.ids.shape[1] == 1 else Call(self, feed.ids.shape[1])
        call.ids.array[:], call.positions.array[:] = feed.ids, feed.positions
        self._run(call, feed.mask)
        self.lengths += feed.counts
        return call.logits.read()

    def _one_by_one(self, longest: int) -> bool:
        """Whether prompts must be fed a sequence at a time.

        com.microsoft.GroupQueryAttention takes several tokens of several sequences only while the cache is empty.
        """
        fresh = longest <= self.chunk and not self.lengths.any()
        return self.variant.pattern == "gqa" and self.batch > 1 and not fresh

    def _kv_token_bytes(self) -> int:
        return self.variant.kv_bytes_per_token

    @abc.abstractmethod
    def _plan(self, prompts: list[np.ndarray]) -> Iterator[Feed]:
        """The calls that feed `prompts`; all rows' last tokens are in the last column of the last one."""

    @abc.abstractmethod
    def _run(self, call: Call, mask: np.ndarray | None) -> None:
        """Run `call`, whose tokens and positions are set; `mask` [B, T] of its new columns (concat), None: all ones."""

    @abc.abstractmethod
    def _prefill_rows(self, prompts: list[np.ndarray]) -> np.ndarray:
        """`prefill` with a session of batch 1 for each sequence, over its part of the cache."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Drop the caches."""
