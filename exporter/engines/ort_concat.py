"""The concat cache form: the present of a step is the runtime's own memory and becomes the past of the next; no copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import torch

from exporter import contract
from exporter.bundle import Variant
from exporter.engines.base import SessionInfo
from exporter.engines.feeding import Feed, left_padded
from exporter.engines.ort_session import ELEMENT_TYPES, Call, OrtSession


class ConcatSession(OrtSession):
    """Caches of P columns that the runtime makes anew each call; attention_mask [B, P] hides the pads on the left."""

    def __init__(self, runtime: Any, variant: Variant, batch: int, capacity: int, info: SessionInfo) -> None:
        super().__init__(runtime, variant, batch, capacity, info)
        layers = range(self.config.num_layers)
        self._past_names = [name for layer in layers for name in contract.past_names(layer)]
        self._present_names = [name for layer in layers for name in contract.present_names(layer)]
        self._mask = np.ones((batch, 0), np.int64)  # at least P columns
        self._forget()

    def _forget(self) -> None:
        self.lengths[:] = 0
        self._columns = 0  # P
        element = ELEMENT_TYPES[self.variant.dtype]
        self._past = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type((self.batch, kv_heads, 0, size), element, self.device)
            for kv_heads in self.config.kv_heads
            for size in (self.config.head_dim, self.config.value_dim)
        ]

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        if length == 0:
            self._forget()
            return
        kept = [np.flatnonzero(row)[:length] for row in self._mask[:, : self._columns]]  # the pads go, row by row
        self._past = [self._take(value, np.stack(kept)) for value in self._past]
        self._columns = length
        self._mask[:, :length] = 1
        self.lengths[:] = length

    def _take(self, value: Any, columns_BP: np.ndarray) -> Any:
        tensor = self._to_torch(value)
        index = torch.from_numpy(columns_BP)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return self._from_torch(tensor.gather(2, index))

    def _to_torch(self, value: Any) -> torch.Tensor:
        """On the host; the very memory of `value` where that is the host's."""
        return torch.from_dlpack(value) if self.device == "cpu" else torch.from_numpy(value.numpy())

    def _from_torch(self, tensor: torch.Tensor) -> Any:
        if self.device == "cpu":
            return onnxruntime.OrtValue.from_dlpack(tensor)
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), self.device, 0)

    def _plan(self, prompts: list[np.ndarray]) -> Iterator[Feed]:
        return left_padded(prompts, self.lengths, self.chunk)

    def _run(self, call: Call, mask: np.ndarray | None) -> None:
        total = self._columns + call.ids.array.shape[1]
        if total > self._mask.shape[1]:
            room = np.ones((self.batch, total + max(256, total // 4)), np.int64)
            room[:, : self._columns] = self._mask[:, : self._columns]
            self._mask = room
        self._mask[:, self._columns : total] = 1 if mask is None else mask
        binding = call.binding
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self._mask[:, :total]))
        try:
            for name, value in zip(self._past_names, self._past, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in self._present_names:  # after the inputs: this empties the very slots that _past looks at
                binding.bind_output(name, self.device, 0)
            call.run(self.runtime)
            self._past = binding.get_outputs()[1:]
        except BaseException:  # an interrupt too: the old columns went with the slots
            self._forget()
            raise
        self._columns = total

    def _prefill_rows(self, prompts: list[np.ndarray]) -> np.ndarray:
        width = max(map(len, prompts))
        old, columns = [self._to_torch(value) for value in self._past], self._columns
        mask = np.concatenate([self._mask[:, :columns], np.zeros((self.batch, width), np.int64)], axis=1)
        new = [value.new_zeros(*value.shape[:2], columns + width, value.shape[3]) for value in old]
        logits = []
        for index, prompt in enumerate(prompts):
            row = ConcatSession(self.runtime, self.variant, 1, self.capacity, self.info)
            row._past = [self._from_torch(value[index : index + 1].contiguous()) for value in old]
            row._mask, row._columns = self._mask[index : index + 1, :columns].copy(), columns
            row.lengths = self.lengths[index : index + 1].copy()
            logits.append(row.prefill([prompt]))
            for target, value in zip(new, row._past, strict=True):
                whole = self._to_torch(value)[0]
                target[index, :, :columns] = whole[:, :columns]
                target[index, :, -len(prompt) :] = whole[:, columns:]
            mask[index, -len(prompt) :] = 1
        self._past = [self._from_torch(value) for value in new]
        self._mask, self._columns = mask, columns + width
        self.lengths += [len(prompt) for prompt in prompts]
        return np.concatenate(logits)

    def _release(self) -> None:
        self._past = []
