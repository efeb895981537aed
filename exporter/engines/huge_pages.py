"""Weights and caches in memory on huge pages.

ONNX Runtime maps weight files as they are, on pages of 4 kB. Where a step reads all weights at the memory's speed, looking up
those pages costs a good part of it. So the bytes are read once into anonymous memory that asks the
kernel for pages of 2 MB, and sessions share them. Where the kernel has none to give, nothing is lost but the time of reading.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo

PAGE, LINE = 2 << 20, 64  # bytes: of a huge page, of what a processor reads at a time
DTYPES = {
    kind: onnx.helper.tensor_dtype_to_np_dtype(kind)
    for name, kind in onnx.TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING")
}
_lock = threading.Lock()
_files: weakref.WeakValueDictionary[tuple[Path, int, int], _File] = weakref.WeakValueDictionary()


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeroed memory of `shape`, on huge pages where it is large and the kernel has some; it costs memory once it is written."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    if count < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):  # which only Linux has
        return np.zeros(shape, dtype)
    # Private, because shared memory has huge pages under other rules; a page more than is used, to start on a whole one.
    try:
        memory = mmap.mmap(-1, count + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + count].view(dtype).reshape(shape)


def zeros_together(shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[np.ndarray]:
    """`zeros` of each shape; those too small for a page of their own lie side by side on pages that they share."""
    item = np.dtype(dtype).itemsize
    sizes = [math.prod(shape) * item for shape in shapes]
    places = [-(-size // LINE) * LINE if size < PAGE else 0 for size in sizes]
    shared = zeros((sum(places),), np.uint8)
    starts = itertools.accumulate(places, initial=0)
    return [
        shared[start : start + size].view(dtype).reshape(shape) if size < PAGE else zeros(shape, dtype)
        for shape, size, start in zip(shapes, sizes, starts, strict=False)
    ]


class _File:
    """The bytes of one weight file."""

    def __init__(self, path: Path, size: int) -> None:
        self.bytes = zeros((size,), np.uint8)
        with path.open("rb", buffering=0) as file:
            view, done = memoryview(self.bytes.data), 0
            while done < size and (count := file.readinto(view[done:])):
                done += count
        if done < size:
            raise OSError(f"it ends after {done} of {size} bytes: it was cut while it was read")


def read(path: Path) -> _File:
    """The bytes of `path`, read once for all that hold them at the same time. Raises OSError, MemoryError."""
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns)
    with _lock:
        if (file := _files.get(key)) is None:
            file = _files[key] = _File(path, status.st_size)
        return file


def initializers(graph: Path) -> tuple[dict[str, Any], list[_File]]:
    """The external weights of `graph` as values of ONNX Runtime, by name, and the files they lie in.

    Both have to be kept as long as a session uses them: the runtime does not. Raises as `read` does, and ValueError for a file
    that ends too early.
    """
    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError:
        raise ValueError("the file is damaged; export the bundle again") from None
    values: dict[str, Any] = {}
    files: dict[str, _File] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        try:
            place = ExternalDataInfo(tensor)
        except ValueError as error:  # no numbers, or one below 0
            raise ValueError(f"{error}; export the bundle again") from None
        name, start, dtype = place.location, int(place.offset or 0), DTYPES.get(tensor.data_type)
        if dtype is None:
            raise ValueError(f"{tensor.name} has type {tensor.data_type}, which is none of weights; export the bundle again")
        length = math.prod(tensor.dims) * dtype.itemsize if place.length is None else int(place.length)
        if name not in files:
            files[name] = read(graph.parent / name)
        data = files[name].bytes[start : start + length]
        if len(data) < length:
            place_of = f"bytes {start:,} to {start + length:,} of {name}, which has {len(files[name].bytes):,}"
            raise ValueError(f"{tensor.name} is said to be {place_of}: one of the two was cut short; export the bundle again")
        data = data.view(dtype).reshape(tuple(tensor.dims))
        values[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(data)
    return values, list(files.values())
