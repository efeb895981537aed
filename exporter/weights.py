"""Weights as they lie in files: read lazily, a block of rows at a time, never a whole model in memory.

A `Weights` is a mapping from the canonical parameter name to a `LazyTensor`. Canonical names are those of the torch model in
exporter/models (which are Hugging Face Llama's). A `FileTensor` knows its bytes on disk, so it can be linked or copied as it
is; a `ComputedTensor` is made when it is read. Two variants that share a tensor share the *object*, so it is written once.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import CheckpointError

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class LazyTensor(abc.ABC):
    """A tensor that is not in memory: its name, dtype and shape, and how to read it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @abc.abstractmethod
    def read(self) -> torch.Tensor:
        """The whole tensor, in memory of its own."""

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor's values in order, flattened; a file tensor gives at most BLOCK_BYTES at a time."""
        yield self.read().reshape(-1)


@dataclass(frozen=True, eq=False)
class FileTensor(LazyTensor):
    """Contiguous little-endian bytes at `offset` of `path`."""

    path: Path
    offset: int

    def read(self) -> torch.Tensor:
        flat = torch.empty(torch.Size(self.shape).numel(), dtype=self.dtype)
        self._read_into(flat, self.offset)
        return flat.reshape(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        step = BLOCK_BYTES // self.dtype.itemsize
        count = torch.Size(self.shape).numel()
        for start in range(0, count, step):
            block = torch.empty(min(step, count - start), dtype=self.dtype)
            self._read_into(block, self.offset + start * self.dtype.itemsize)
            yield block

    def rows(self, start: int, stop: int, name: str) -> FileTensor:
        """Rows [start, stop) of the first dimension, as a tensor in the same file: how a fused QKV matrix is taken apart."""
        row_bytes = self.nbytes // self.shape[0]
        return FileTensor(name, self.dtype, (stop - start, *self.shape[1:]), self.path, self.offset + start * row_bytes)

    def _read_into(self, flat: torch.Tensor, offset: int) -> None:
        if flat.numel() == 0:
            return
        view = memoryview(flat.view(torch.uint8).numpy().data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path} ends inside tensor {self.name!r}")
                done += count


@dataclass(frozen=True, eq=False)
class ComputedTensor(LazyTensor):
    """A tensor made from others when it is read (a pooled head, a dequantised matrix)."""

    compute: Callable[[], torch.Tensor]

    def read(self) -> torch.Tensor:
        value = self.compute()
        assert tuple(value.shape) == self.shape, (self.name, tuple(value.shape), self.shape)
        return value.to(self.dtype)


Weights = Mapping[str, LazyTensor]


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The tensor itself where it has the dtype already."""
    if tensor.dtype == dtype:
        return tensor
    return ComputedTensor(tensor.name, dtype, tensor.shape, lambda: tensor.read().to(dtype))
