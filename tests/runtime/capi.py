"""headpool.h through ctypes: sessions that look like the Python engine's, and its errors."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Int64s = c.POINTER(c.c_int64)
Floats = c.POINTER(c.c_float)
OnTokens = c.CFUNCTYPE(c.c_int32, c.c_void_p, Int64s, c.c_size_t)
ARGUMENT, BUNDLE, CAPACITY, BACKEND, MEMORY, INTERNAL = range(1, 7)


class RuntimeFailure(Exception):
    """What a function that failed gave: its status, and hp_last_error()."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sized(c.Structure):
    """A struct whose first member is its size."""

    def __init__(self, **values: Any) -> None:
        super().__init__(size=c.sizeof(self), **values)


class ModelOptions(Sized):
    _fields_ = (("size", c.c_size_t), ("variant", c.c_char_p), ("threads", c.c_int32), ("backend", c.c_char_p))


class SessionOptions(Sized):
    _fields_ = (("size", c.c_size_t), ("batch", c.c_int64), ("capacity", c.c_int64), ("chunk", c.c_int64))


class Sampling(Sized):
    _fields_ = (
        ("size", c.c_size_t),
        ("temperature", c.c_double),
        ("top_k", c.c_int64),
        ("top_p", c.c_double),
        ("seed", c.c_uint64),
    )


class ModelInfo(Sized):
    _fields_ = (
        ("size", c.c_size_t),
        *((name, c.c_char_p) for name in ("variant", "pattern", "cache", "dtype")),
        *((name, c.c_int64) for name in ("vocab_size", "max_positions", "heads", "layers")),
        ("kv_heads", Int64s),
        ("stop_ids", Int64s),
        ("stop_id_count", c.c_size_t),
        ("weight_bytes", c.c_uint64),
        ("kv_bytes_per_token", c.c_uint64),
        ("threads", c.c_int32),
        ("encoder_layers", c.c_int64),
        *((name, c.c_char_p) for name in ("backend", "provider", "library", "library_version", "quantize", "cache_dtype")),
    )


def listing(info: ModelInfo) -> dict[str, Any]:
    """Its members, texts and lists as Python has them."""
    texts = {name: getattr(info, name).decode() for name, kind in ModelInfo._fields_ if kind is c.c_char_p}
    lists = {"kv_heads": info.kv_heads[: info.layers], "stop_ids": info.stop_ids[: info.stop_id_count]}
    return {**{name: getattr(info, name) for name, _ in ModelInfo._fields_ if name not in lists}, **texts, **lists}


OnVariant = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(ModelInfo))


class Api:
    """libheadpool.so."""

    def __init__(self, path: Path) -> None:
        self.c = c.CDLL(str(path))
        for name in ("hp_last_error", "hp_version", "hp_onnxruntime_version"):
            getattr(self.c, name).restype = c.c_char_p
        self.c.hp_session_lengths.restype = Int64s
        self.c.hp_session_kv_bytes.restype = c.c_uint64
        for name in ("hp_session_capacity", "hp_session_batch"):
            getattr(self.c, name).restype = c.c_int64

    def check(self, status: int) -> None:
        if status:
            raise RuntimeFailure(status, self.c.hp_last_error().decode())

    def variants(self, bundle: Path) -> list[dict[str, Any]]:
        """The `listing` of each."""
        found: list[dict[str, Any]] = []
        on_variant = OnVariant(lambda _, info: found.append(listing(info.contents)))
        self.check(self.c.hp_variants(str(bundle).encode(), on_variant, None))
        return found

    def open(self, bundle: Path, variant: str = "", threads: int = 1, backend: str = "") -> Model:
        handle = c.c_void_p()
        options = ModelOptions(variant=variant.encode(), threads=threads, backend=backend.encode())
        self.check(self.c.hp_model_open(str(bundle).encode(), c.byref(options), c.byref(handle)))
        return Model(self, handle)

    def pick(self, logits: np.ndarray, draws: int = 1, **sampling: Any) -> np.ndarray:
        """int64 [draws, B] from float32 logits [B, V], with one sampler."""
        logits = np.ascontiguousarray(logits, np.float32)
        handle, tokens = c.c_void_p(), np.empty((draws, len(logits)), np.int64)
        self.check(self.c.hp_sampler_create(c.byref(Sampling(**sampling)), c.c_int64(len(logits)), c.byref(handle)))
        try:
            for row in tokens:
                data, out = logits.ctypes.data_as(Floats), row.ctypes.data_as(Int64s)
                self.check(self.c.hp_sampler_pick(handle, data, c.c_size_t(logits.shape[1]), out))
        finally:
            self.c.hp_sampler_free(handle)
        return tokens


class Model:
    def __init__(self, api: Api, handle: c.c_void_p) -> None:
        self.api, self.handle = api, handle

    def info(self) -> ModelInfo:
        info = ModelInfo()
        self.api.check(self.api.c.hp_model_get_info(self.handle, c.byref(info)))
        return info

    def session(self, batch: int = 1, capacity: int = 0, chunk: int = 0) -> CppSession:
        return CppSession(self, batch, capacity, chunk)

    def close(self) -> None:
        self.api.c.hp_model_free(self.handle)
        self.handle = c.c_void_p()


class CppSession:
    """What exporter.engines.base.Session offers, as far as tests use it; logits are copies."""

    def __init__(self, model: Model, batch: int, capacity: int, chunk: int) -> None:
        self.api, self.vocab = model.api, model.info().vocab_size
        self.handle = c.c_void_p()
        options = SessionOptions(batch=batch, capacity=capacity, chunk=chunk)
        self.api.check(self.api.c.hp_session_create(model.handle, c.byref(options), c.byref(self.handle)))
        self.batch: int = self.api.c.hp_session_batch(self.handle)
        self.capacity: int = self.api.c.hp_session_capacity(self.handle)

    @property
    def lengths(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.c.hp_session_lengths(self.handle), (self.batch,)).copy()

    def prefill(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        pointers, counts, logits = *_prompts(prompts), Floats()
        self._check("prefill", pointers, counts, c.c_size_t(len(prompts)), c.byref(logits))
        return self._copy(logits)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        tokens, logits = np.ascontiguousarray(tokens, np.int64), Floats()
        self._check("decode", tokens.ctypes.data_as(Int64s), c.c_size_t(len(tokens)), c.byref(logits))
        return self._copy(logits)

    def rewind(self, length: int) -> None:
        self._check("rewind", c.c_int64(length))

    def reset(self) -> None:
        self.rewind(0)

    def kv_bytes(self) -> int:
        return self.api.c.hp_session_kv_bytes(self.handle)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        count: int,
        stop_ids: Sequence[int] = (),
        until: Callable[[list[int]], bool] = lambda tokens: False,
        **sampling: Any,
    ) -> list[list[int]]:
        """The tokens of each call of the callback, until there are `count` or `until` says so."""
        seen: list[list[int]] = []

        def on_tokens(_: Any, tokens: Any, batch: int) -> int:
            seen.append(tokens[:batch])
            return int(until(seen[-1]))

        pointers, counts = _prompts(prompts)
        stops = np.array(stop_ids, np.int64)
        self.api.check(
            self.api.c.hp_generate(
                self.handle,
                pointers,
                counts,
                c.c_size_t(len(prompts)),
                c.c_int64(count),
                c.byref(Sampling(**sampling)),
                stops.ctypes.data_as(Int64s),
                c.c_size_t(len(stops)),
                OnTokens(on_tokens),
                None,
            )
        )
        return seen

    def close(self) -> None:
        self.api.c.hp_session_free(self.handle)
        self.handle = c.c_void_p()

    def _check(self, name: str, *arguments: Any) -> None:
        self.api.check(getattr(self.api.c, f"hp_session_{name}")(self.handle, *arguments))

    def _copy(self, logits: Any) -> np.ndarray:
        return np.ctypeslib.as_array(logits, (self.batch, self.vocab)).copy()


def _prompts(prompts: Sequence[np.ndarray]) -> tuple[Any, Any]:
    arrays = [np.ascontiguousarray(prompt, np.int64) for prompt in prompts]
    pointers = (Int64s * len(arrays))(*(array.ctypes.data_as(Int64s) for array in arrays))
    pointers.keep = arrays
    return pointers, (c.c_size_t * len(arrays))(*map(len, arrays))
