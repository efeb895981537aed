"""An encoder-decoder in ONNX Runtime. What cross-attention reads stays where the encoder left it, bound once an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime

from exporter.bundle import Seq2SeqVariant
from exporter.contract_seq2seq import names
from exporter.engines.base import SessionInfo
from exporter.engines.ort_session import DEVICES, ELEMENT_TYPES, STORAGE
from exporter.engines.ort_static import Buffer, next_rows
from exporter.engines.seq2seq import Seq2SeqSession
from exporter.errors import EngineError

PAST, PRESENT = "past_key_values", "present"


class OrtSeq2SeqSession(Seq2SeqSession):
    """Both cache forms: static buffers of our own, written in place; concat caches passed from step to step."""

    def __init__(
        self, encoder: Any, decoder: Any, variant: Seq2SeqVariant, batch: int, capacity: int, info: SessionInfo
    ) -> None:
        super().__init__(variant.config, batch, capacity, info)
        self.encoder, self.runtime, self.variant, self.device = encoder, decoder, variant, DEVICES[info.provider]
        self.profile: Path | None = None  # where the runtime wrote its profile, after close()
        self.static = variant.cache == "static"
        layers = range(self.config.num_layers)
        self._self_names = [pair for layer in layers for pair in _pairs(layer, "decoder")]
        self._cross_names = [pair for layer in layers for pair in _pairs(layer, "encoder")]
        sizes = (self.config.head_dim, self.config.value_dim)
        self._shapes = [(kv_heads, size) for kv_heads in self.config.kv_heads for size in sizes]
        self._binding = decoder.io_binding()
        self._mask = np.zeros((batch, 0), np.int64)
        self._buffers: list[Buffer] = []  # static
        self._past: list[Any] = []  # concat
        dtype = variant.dtype
        self._logits = np.zeros((batch, 1, self.config.vocab_size), STORAGE[dtype])
        address = self._logits.ctypes.data
        self._binding.bind_output("logits", "cpu", 0, ELEMENT_TYPES[dtype], self._logits.shape, address)

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> None:
        binding = self.encoder.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        for _, present in self._cross_names:
            binding.bind_output(present, self.device, 0)
        _run(self.encoder, binding)
        for (past, _), value in zip(self._cross_names, binding.get_outputs(), strict=True):
            self._binding.bind_ortvalue_input(past, value)
        self._mask = mask  # the binding looks at its memory
        self._binding.bind_cpu_input("encoder_attention_mask", mask)
        if not self.static:
            self._past = [self._empty(*shape) for shape in self._shapes]

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        binding = self._binding
        ids = np.ascontiguousarray(tokens[:, None])
        binding.bind_cpu_input("input_ids", ids)
        if self.static:
            positions = np.full((self.batch, 1), self.rows, np.int64)
            binding.bind_cpu_input("position_ids", positions)
            self._reserve(self.rows + 1)
            _run(self.runtime, binding)
        else:
            for (past, _), value in zip(self._self_names, self._past, strict=True):
                binding.bind_ortvalue_input(past, value)
            for _, present in self._self_names:
                binding.bind_output(present, self.device, 0)
            _run(self.runtime, binding)
            self._past = binding.get_outputs()[1:]
        logits = self._logits.view(ml_dtypes.bfloat16) if self.variant.dtype == "bf16" else self._logits
        return logits[:, 0].astype(np.float32, copy=False)

    def _reserve(self, need: int) -> None:
        held = self._buffers[0].shape[2] if self._buffers else 0
        if need <= held:
            return
        rows = next_rows(need, held, self.capacity + 1)
        try:  # all at first, so that nothing has changed when memory is short
            new = [Buffer((self.batch, heads, rows, size), self.variant.dtype, self.device) for heads, size in self._shapes]
        except MemoryError:
            raise EngineError(f"no memory for a cache of {rows} tokens; lower --capacity or --batch") from None
        for old, buffer in zip(self._buffers, new, strict=False):
            buffer.load(old.to_host()[:, :, : self.rows])
        for (past, present), buffer in zip(self._self_names, new, strict=True):
            buffer.bind(self._binding, past, present)
        self._buffers = new

    def _keep(self) -> None:
        if not self.static:  # static rows are overwritten before they are seen
            self._past = [self._first_rows(value) for value in self._past]

    def _first_rows(self, value: Any) -> Any:
        rows = np.ascontiguousarray(value.numpy()[:, :, : self.rows])
        return onnxruntime.OrtValue.ortvalue_from_numpy(rows, self.device, 0)

    def _forget(self) -> None:
        self._past = []

    def _empty(self, heads: int, size: int) -> Any:
        element = ELEMENT_TYPES[self.variant.dtype]
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type((self.batch, heads, 0, size), element, self.device)

    def _kv_token_bytes(self) -> int:
        return self.variant.kv_bytes_per_token

    def close(self) -> None:
        if self.runtime is None:
            return
        if self.runtime.get_session_options().enable_profiling:
            self.profile = Path(self.runtime.end_profiling())
        del self._binding
        self._buffers, self._past = [], []
        self.encoder = self.runtime = None


def _pairs(layer: int, stack: str) -> list[tuple[str, str]]:
    """(past, present) of K and of V."""
    return list(zip(names(PAST, layer, stack), names(PRESENT, layer, stack), strict=True))


def _run(runtime: Any, binding: Any) -> None:
    try:
        runtime.run_with_iobinding(binding)
    except RuntimeError as error:  # memory that ran out, above all
        raise EngineError(f"onnxruntime failed in a step: {' '.join(str(error).split())[:300]}") from None
