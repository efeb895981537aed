"""The static cache form: caches live in buffers of ours, bound as input and as output, so a step writes its rows in place.

The runtime's attention reads all S rows there are, so S follows the context in small steps (`next_rows`). `fused` reads those
that are filled: there S is the capacity that was chosen, and no step copies a cache. Without a choice it grows, too: the
model's own context may be far more than is ever filled, and each head's first rows would lie on a huge page of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime

from exporter import contract
from exporter.bundle import Variant
from exporter.engines import huge_pages
from exporter.engines.base import SessionInfo
from exporter.engines.feeding import Feed, right_padded
from exporter.engines.ort_session import ELEMENT_TYPES, STORAGE, Call, OrtSession
from exporter.errors import EngineError


def next_rows(need: int, rows: int, capacity: int, ahead: int = 0) -> int:
    """S that holds `need` rows, from `rows` on: a multiple of 64, or the capacity.

    In decoding S grows by 1/16, so that at most that is read for nothing and at most 16 rows are copied a token, a small part
    of what a step reads. A prefill that goes on to `ahead` rows doubles S until then: its early chunks do not read all of it.
    """
    if ahead > need:
        doubled = max(need, 2 * rows)
        need = ahead if ahead <= doubled + 64 else doubled
    elif rows:
        need = max(need, rows + max(64, rows // 16))
    return min(capacity, -(-need // 64) * 64)


class Buffer:
    """Zeros, on the host or brought to a device, bound by address.

    Zeros matter: a masked cache row is multiplied by probability 0, and 0 times the NaN that fresh memory may hold is NaN.
    On the host they cost no memory until a row is written.
    """

    def __init__(self, zeros: np.ndarray, dtype: str, device: str) -> None:
        self.shape, self.element, self.device = zeros.shape, ELEMENT_TYPES[dtype], device
        self.host: np.ndarray | None = zeros
        self.value: Any = None
        if device != "cpu":
            self.value, self.host = onnxruntime.OrtValue.ortvalue_from_numpy(self.host, device, 0), None
        self.itemsize = np.dtype(STORAGE[dtype]).itemsize
        self.address = self.host.ctypes.data if self.host is not None else self.value.data_ptr()

    def row(self, index: int) -> Buffer:
        """The part of one sequence, the same memory; `self` has to outlive it."""
        part = copy.copy(self)
        part.shape = (1, *self.shape[1:])
        part.address += index * math.prod(part.shape) * self.itemsize
        return part

    def to_host(self) -> np.ndarray:
        return self.host if self.host is not None else self.value.numpy()

    def load(self, rows: np.ndarray) -> None:
        """Fill the first rows (third axis) with `rows`."""
        if self.host is not None:
            self.host[:, :, : rows.shape[2]] = rows
            return
        whole = np.zeros(self.shape, rows.dtype)
        whole[:, :, : rows.shape[2]] = rows
        self.value.update_inplace(whole)

    def bind_input(self, binding: Any, name: str) -> None:
        binding.bind_input(name, self.device, 0, self.element, self.shape, self.address)

    def bind_output(self, binding: Any, name: str) -> None:
        binding.bind_output(name, self.device, 0, self.element, self.shape, self.address)

    def bind(self, binding: Any, source: str, target: str) -> None:
        self.bind_input(binding, source)
        self.bind_output(binding, target)


Names = tuple[str, str]  # past and present of a cache


def resized(
    variant: Variant, names: list[Names], batch: int, rows: int, device: str, old: dict[Names, Buffer], used: int
) -> dict[Names, Buffer]:
    """Caches of `rows` rows for K and V of every layer, the first `used` those of `old`, which are freed one by one.

    Raises EngineError where memory is short; then `old` is as it was.
    """
    caches = {binding.name: binding for binding in variant.inputs() if binding.role == "cache"}
    (dtype,) = {caches[past].dtype for past, _ in names}
    shapes = [(batch, int(caches[past].shape[1]), rows, int(caches[past].shape[3])) for past, _ in names]
    try:
        memory = huge_pages.zeros_together(shapes, STORAGE[dtype])
        new = {name: Buffer(zeros, dtype, device) for name, zeros in zip(names, memory, strict=True)}
    except MemoryError:
        size = batch * rows * variant.kv_bytes_per_token
        raise EngineError(f"no memory for a cache of {size / 1e6:.0f} MB; lower --capacity or --batch") from None
    for name, buffer in new.items():
        if used:
            buffer.load(old.pop(name).to_host()[:, :, :used])
    return new


class StaticSession(OrtSession):
    """Caches [B, G, S, D] of our own, written in place; S grows up to `capacity`."""

    def __init__(self, runtime: Any, variant: Variant, batch: int, capacity: int, info: SessionInfo) -> None:
        super().__init__(runtime, variant, batch, capacity, info)
        self.rows = 0  # S
        chosen = variant.pattern == "fused" and capacity < variant.config.max_positions
        self._whole = chosen or self.provider.compiles  # an engine that is compiled for its sizes has one S
        self._caches: dict[Names, Buffer] = {}
        self._bound_rows = 0  # S of the buffers that the decode step's binding knows
        self._ahead = 0  # rows that the prefill now running will need, and one for the first decoded token

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        self.lengths[:] = length  # the rows after it are overwritten before they are seen
        self._ahead = 0
        if self._whole:
            return
        # Where most are such, S follows the context down, too; not with a few tokens taken back, nor with all of them, as what
        # comes next is often as long.
        if length and self.rows > (rows := next_rows(length, length, self.capacity)) * 5 // 4:
            self._resize(rows)

    def _plan(self, prompts: list[np.ndarray]) -> Iterator[Feed]:
        self._ahead = 1 + int(max(n + len(prompt) for n, prompt in zip(self.lengths, prompts, strict=True)))
        return right_padded(prompts, self.lengths, self.capacity, self.chunk)

    def _run(self, call: Call, mask: np.ndarray | None) -> None:
        self._reserve(int(call.positions.array[:, -1].max()) + 1)
        if call is not self._step or self._bound_rows != self.rows:
            for (past, present), buffer in self._caches.items():
                buffer.bind(call.binding, past, present)
            if call is self._step:
                self._bound_rows = self.rows
        call.run(self.runtime)

    def _reserve(self, need: int) -> None:
        if need > self.rows:
            self._resize(self.capacity if self._whole else next_rows(need, self.rows, self.capacity, self._ahead))

    def _resize(self, rows: int) -> None:
        self._bound_rows = 0
        names = [pair for layer in range(self.config.num_layers) for pair in _alias_pairs(layer)]
        used = int(self.lengths.max())
        self._caches = resized(self.variant, names, self.batch, rows, self.device, self._caches, used)
        self.rows = rows

    def _prefill_rows(self, prompts: list[np.ndarray]) -> np.ndarray:
        ends = self.lengths + [len(prompt) for prompt in prompts]
        self._ahead = 0
        self._reserve(min(int(ends.max()) + 1, self.capacity))
        logits = []
        for index, prompt in enumerate(prompts):
            row = StaticSession(self.runtime, self.variant, 1, self.capacity, self.info)
            row._caches = {names: buffer.row(index) for names, buffer in self._caches.items()}
            row.rows, row.lengths = self.rows, self.lengths[index : index + 1].copy()
            logits.append(row.prefill([prompt]))
        self.lengths[:] = ends
        return np.concatenate(logits)

    def _release(self) -> None:
        self._caches.clear()


def _alias_pairs(layer: int) -> list[Names]:
    """Of K and of V."""
    return list(zip(contract.past_names(layer), contract.present_names(layer), strict=True))
