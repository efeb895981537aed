"""GGUF files: the metadata, and where each tensor's bytes lie.

The layout is ggml's docs/gguf.md, versions 2 and 3, little-endian. The `gguf` package's own reader believes every count it
reads, so a damaged file can keep it busy for ever; here each count is held against the bytes that are left.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from exporter.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where general.alignment is not given
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"}
MAX_STRING_BYTES = 64 << 20
MAX_ARRAY_ITEMS = 16 << 20
MAX_DIMENSIONS = 4


class _Damaged(Exception):
    """Why a file is not whole."""


@dataclass(frozen=True)
class GgufEntry:
    """One tensor: `shape` is outermost first (torch's order), `offset` counts from the file's start."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A parsed header. Metadata values are numbers, strings, booleans, or lists of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file. Raises CheckpointError where the file is not exactly well formed."""
    try:
        with open(path, "rb") as file:
            return _Parser(path, file, path.stat().st_size).parse()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except _Damaged as error:
        raise CheckpointError(f"{path} is not a whole GGUF file: {error}; download it again") from None


class _Parser:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.left = path, file, size, size

    def parse(self) -> GgufFile:
        if self.take(4) != MAGIC:
            raise _Damaged("it does not start with GGUF")
        version = self.scalar(4)
        if version not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise CheckpointError(f"{self.path}: GGUF version {version} is not one of {known} in little-endian order")
        tensor_count, key_count = self.scalar(10), self.scalar(10)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            if key in metadata:
                raise _Damaged(f"key {key!r} stands twice")
            metadata[key] = self.value(self.scalar(4))
        infos: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            name = self.string()
            if name in infos:
                raise _Damaged(f"tensor {name!r} stands twice")
            infos[name] = self.tensor_info(name)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise _Damaged(f"alignment {alignment!r} is not a power of two")
        position = self.size - self.left
        start = end = position + -position % alignment
        tensors = {}
        for name, (kind, shape, offset) in infos.items():
            if start + offset != end:  # llama.cpp asks for this too
                raise _Damaged(f"tensor {name!r} starts at byte {start + offset}, not at {end} after the one before it")
            tensors[name] = self.place(name, kind, shape, end)
            end += tensors[name].nbytes + -tensors[name].nbytes % alignment
        return GgufFile(self.path, metadata, tensors)

    def tensor_info(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
        dimensions = self.scalar(4)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self.scalar(10) for _ in range(dimensions)]))
        kind, offset = self.scalar(4), self.scalar(10)
        try:
            return GGMLQuantizationType(kind), shape, offset
        except ValueError:
            raise _Damaged(f"tensor {name!r} has the unknown type {kind}") from None

    def place(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int) -> GgufEntry:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _Damaged(f"tensor {name!r} of {kind.name} has rows of {shape[-1]}, not a multiple of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > self.size:
            raise _Damaged(f"tensor {name!r} ends at byte {offset + nbytes}, the file has {self.size}")
        return GgufEntry(kind, shape, offset, nbytes)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        return self.scalar(kind)

    def array(self) -> list[Any]:
        kind, count = self.scalar(4), self.scalar(10)
        if kind != STRING and kind not in SCALARS:
            raise _Damaged(f"an array of type {kind}")
        if count > MAX_ARRAY_ITEMS:
            raise _Damaged(f"an array of {count} items")
        if kind == STRING:
            if count * 8 > self.left:
                raise _Damaged(f"an array of {count} strings with {self.left} bytes left")
            return [self.string() for _ in range(count)]
        return np.frombuffer(self.take(count * np.dtype(SCALARS[kind]).itemsize), SCALARS[kind]).tolist()

    def scalar(self, kind: int) -> Any:
        if kind not in SCALARS:
            raise _Damaged(f"a value of type {kind}")
        return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        if length > MAX_STRING_BYTES:
            raise _Damaged(f"a string of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged(f"a string is not UTF-8: {error}") from None

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _Damaged(f"{count} bytes are needed where {self.left} are left")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise _Damaged("it ended while it was read")
        return data
