"""Where each weight of a bundle lies: what all variants share stands once, what one changes in a file of its own.

model.safetensors         what every variant reads
model.<group>.safetensors what one KV-head count changes
<checkpoint's file>       a hard link to the checkpoint's own bytes (with --weights link), where they serve as they are

Where two of them would have one name, the later one gets a number.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from exporter.checkpoint import write_safetensors
from exporter.errors import UserError
from exporter.weights import FileTensor, LazyTensor, Weights

Storage = Literal["copy", "link"]
STORAGES: tuple[Storage, ...] = ("copy", "link")
WEIGHTS = (".safetensors", ".gguf")  # no other file of a bundle ends so


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie inside the bundle."""

    file: str
    offset: int
    nbytes: int


class Layout:
    """Places every tensor of the variants' weights in `folder`, in `dtype`."""

    def __init__(self, folder: Path, dtype: torch.dtype, storage: Storage, on_bytes: Callable[[int], None]) -> None:
        self.folder, self.dtype, self.storage, self.on_bytes = folder, dtype, storage, on_bytes
        self.places: dict[int, Place] = {}  # by id of the LazyTensor: sharing is by object
        self.linked: list[FileTensor] = []
        self._links: dict[Path, str] = {}
        self._kept: list[LazyTensor] = []  # keeps the ids alive

    def write(self, variants: Mapping[str, Weights]) -> None:
        """Write or link every tensor. Keys of `variants` name the files of what is not shared by all."""
        everywhere = set.intersection(*({id(t) for t in weights.values()} for weights in variants.values()))
        for label, weights in variants.items():
            new = {name: t for name, t in weights.items() if id(t) not in self.places and not self._link(t)}
            shared = {name: t for name, t in new.items() if id(t) in everywhere}
            own = {name: t for name, t in new.items() if id(t) not in everywhere}
            self._write("model.safetensors", shared)
            self._write(f"model.{label}.safetensors", own)

    def place(self, tensor: LazyTensor) -> Place:
        return self.places[id(tensor)]

    def _write(self, file: str, tensors: Mapping[str, LazyTensor]) -> None:
        if not tensors:
            return
        file = self._free(file)
        spans = write_safetensors(self.folder / file, tensors, dtype=self.dtype, on_bytes=self.on_bytes)
        for name, tensor in tensors.items():
            offset, nbytes = spans[name]
            self._keep(tensor, Place(file, offset, nbytes))

    def _link(self, tensor: LazyTensor) -> bool:
        if self.storage != "link" or not isinstance(tensor, FileTensor) or tensor.dtype != self.dtype:
            return False
        self._keep(tensor, Place(self._linked_file(tensor.path), tensor.offset, tensor.nbytes))
        self.linked.append(tensor)
        return True

    def _linked_file(self, path: Path) -> str:
        real = path.resolve()
        if real not in self._links:
            name = self._free(path.name)
            try:
                os.link(real, self.folder / name)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                    raise UserError(
                        f"{path} cannot be hard-linked beside the bundle ({error.strerror}); use --weights copy"
                    ) from None
                raise
            self._links[real] = name
        return self._links[real]

    def _free(self, name: str) -> str:
        """`name`, or one like it that the folder does not hold. An index may call a shard anything, config.json say, which
        export would then write through the link into the checkpoint: what is not named like weights is named so."""
        stem, suffix = os.path.splitext(name)
        if suffix not in WEIGHTS:
            stem, suffix = name, WEIGHTS[0]
        names = itertools.chain([stem + suffix], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
        return next(name for name in names if not os.path.lexists(self.folder / name))

    def _keep(self, tensor: LazyTensor, place: Place) -> None:
        self.places[id(tensor)] = place
        self._kept.append(tensor)
