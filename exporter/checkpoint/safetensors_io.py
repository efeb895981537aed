"""Safetensors files: where each tensor's bytes lie, and a writer that streams a block of rows at a time.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, the data. The reader is
at least as strict as the safetensors library: what it accepts, the library opens. The writer pads the header with spaces so
that the data starts on a page.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from exporter.errors import CheckpointError
from exporter.files import new_file
from exporter.weights import LazyTensor

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {**{dtype: name for name, dtype in TORCH_DTYPES.items()}, torch.uint8: "U8"}
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
PAGE_BYTES = 4096
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the format names it, and where its bytes lie, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file. Raises CheckpointError where the file is not exactly well formed."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if size < 10:
                raise _damaged(path, f"it has {size} bytes, too few for a header")
            length = struct.unpack("<Q", prefix)[0]
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"its header should be {length} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a map of strings")
    entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _damaged(path, f"tensor {name!r} starts at byte {entry.offset}, not at {end} where the one before it ends")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, the file has {size}")
    return entries


def _entry(path: Path, name: str, item: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, stop) = item["dtype"], item["shape"], item["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets") from None
    if set(item) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} has unknown keys")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _damaged(path, f"tensor {name!r} has dtype {dtype!r}, which headpool does not know")
    if not isinstance(shape, list) or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, stop)):
        raise _damaged(path, f"tensor {name!r} has a shape or offsets that are not whole numbers ≥ 0")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - begin != nbytes:
        raise _damaged(path, f"tensor {name!r} of {dtype} {shape} needs {nbytes} bytes, its offsets hold {stop - begin}")
    return Entry(dtype, tuple(shape), start + begin, nbytes)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return result


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {why}; download it again")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, tuple[int, int]]:
    """Stream `tensors` to a new file, cast to `dtype` where one is given (but uint8); gives each one's
    (offset, bytes) in the file.

    Widest dtypes come first, so every tensor is aligned to its own element. A NaN or infinite value, also one that the cast
    makes, raises CheckpointError with the tensor's name, and no file is left. `on_bytes` hears of every block written.
    """
    for name, tensor in tensors.items():
        if stored_dtype(tensor, dtype) not in NAMES:
            raise CheckpointError(f"tensor {name!r} of {dtype or tensor.dtype} cannot be written; choose F32, F16 or BF16")
    names = sorted(tensors, key=lambda name: -stored_dtype(tensors[name], dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name in names:
        kind, count = stored_dtype(tensors[name], dtype), math.prod(tensors[name].shape)
        places[name] = (end, count * kind.itemsize)
        end += places[name][1]
        header[name] = {"dtype": NAMES[kind], "shape": list(tensors[name].shape), "data_offsets": [places[name][0], end]}
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-(len(raw) + 8) % PAGE_BYTES)
    with new_file(Path(path)) as temporary, open(temporary, "xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in names:
            _stream(file, name, tensors[name], stored_dtype(tensors[name], dtype), on_bytes)
        assert file.tell() == 8 + len(raw) + end, "a tensor gave another number of values than its shape says"
    return {name: (8 + len(raw) + offset, nbytes) for name, (offset, nbytes) in places.items()}


def stored_dtype(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    """What `tensor` is written as where floating-point numbers become `dtype`."""
    return tensor.dtype if dtype is None or tensor.dtype == torch.uint8 else dtype


def _stream(file: BinaryIO, name: str, tensor: LazyTensor, dtype: torch.dtype, on_bytes: Callable[[int], None]) -> None:
    for block in tensor.blocks():
        refuse_non_finite(name, block)
        if block.dtype != dtype:
            block = block.to(dtype)
            if not _finite(block):
                raise CheckpointError(f"tensor {name!r} has values beyond the range of {dtype}; choose bf16 or fp32")
        if block.numel():
            file.write(block.contiguous().view(torch.uint8).numpy().data)
            on_bytes(block.nbytes)


def check_finite(tensor: LazyTensor) -> None:
    """Read the tensor through and raise CheckpointError where a value is NaN or infinite."""
    for block in tensor.blocks():
        refuse_non_finite(tensor.name, block)


def refuse_non_finite(name: str, block: torch.Tensor) -> None:
    """Raises CheckpointError where a value of the tensor `name` is NaN or infinite."""
    if not _finite(block):
        raise CheckpointError(
            f"tensor {name!r} holds NaN or infinite values; the checkpoint is damaged or its training diverged"
        )


def _finite(block: torch.Tensor) -> bool:
    # A finite sum has finite terms, and a sum runs at the speed of memory; only a sum that overflows needs the slow look.
    return bool(torch.isfinite(block.sum())) or bool(torch.isfinite(block).all())


def scan(files: Iterable[Path]) -> str:
    """sha256 (hex) of the files' bytes, one after the other. Each is read once, in blocks, with the GIL released."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_BLOCK_BYTES))
    for path in files:
        try:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
