"""Tensors put away on disk until they are read again: a converted model does not have to fit into memory."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from exporter.weights import ComputedTensor, LazyTensor


class Scratch:
    """A file without a name in the system's folder for temporary files (TMPDIR). It is gone when nothing refers to it, and
    after a crash."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="headpool-")  # noqa: SIM115 – as long-lived as its tensors

    def keep(self, name: str, tensor: Tensor) -> LazyTensor:
        """`tensor` as a lazy one that holds no memory."""
        data = tensor.contiguous()
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(data.view(torch.uint8).numpy().data)
        self._file.flush()
        dtype, shape, nbytes = tensor.dtype, tuple(tensor.shape), data.nbytes

        def read() -> Tensor:
            flat = torch.empty(nbytes, dtype=torch.uint8)
            self._file.seek(offset)
            count = self._file.readinto(memoryview(flat.numpy().data))
            assert count == nbytes, (name, count, nbytes)
            return flat.view(dtype).reshape(shape)

        return ComputedTensor(name, dtype, shape, read)
