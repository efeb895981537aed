"""An encoder-decoder in ONNX Runtime. What cross-attention reads stays where the encoder wrote it, bound once an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporter.bundle import Seq2SeqVariant
from exporter.contract_seq2seq import names
from exporter.engines.base import SessionInfo
from exporter.engines.ort_session import ELEMENT_TYPES, Scores, run
from exporter.engines.ort_static import Buffer, Names, next_rows, resized
from exporter.engines.providers import PROVIDERS
from exporter.engines.seq2seq import Seq2SeqSession

PAST, PRESENT = "past_key_values", "present"


class OrtSeq2SeqSession(Seq2SeqSession):
    """Both cache forms: static buffers of our own, written in place; concat caches passed from step to step."""

    def __init__(
        self, encoder: Any, decoder: Any, variant: Seq2SeqVariant, batch: int, capacity: int, info: SessionInfo
    ) -> None:
        super().__init__(variant.config, batch, capacity, info)
        self.encoder, self.runtime, self.variant, self.device = encoder, decoder, variant, PROVIDERS[info.provider].device
        self.profile: Path | None = None  # where the runtime wrote its profile, after close()
        self.static = variant.cache == "static"
        layers = range(self.config.num_layers)
        self._self_names = [pair for layer in layers for pair in _pairs(layer, "decoder")]
        self._cross_names = [pair for layer in layers for pair in _pairs(layer, "encoder")]
        self._binding = decoder.io_binding()
        self._mask = np.zeros((batch, 0), np.int64)
        self._cross: dict[Names, Buffer] = {}  # what cross-attention reads
        self._caches: dict[Names, Buffer] = {}  # static
        self._held = 0  # their rows
        self._past: list[Any] = []  # concat
        self._logits = Scores(self._binding, variant.dtype, (batch, 1, self.config.vocab_size))

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> None:
        binding = self.encoder.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        self._cross.clear()  # one input's at a time
        self._cross = resized(self.variant, self._cross_names, self.batch, ids.shape[1], self.device, {}, 0)
        for (past, present), buffer in self._cross.items():
            buffer.bind_output(binding, present)
            buffer.bind_input(self._binding, past)
        run(self.encoder, binding)
        self._mask = mask  # the binding looks at its memory
        self._binding.bind_cpu_input("encoder_attention_mask", mask)
        if not self.static:
            sizes = (self.config.head_dim, self.config.value_dim)
            self._past = [self._empty(kv_heads, size) for kv_heads in self.config.kv_heads for size in sizes]

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        binding = self._binding
        ids = np.ascontiguousarray(tokens[:, None])
        binding.bind_cpu_input("input_ids", ids)
        if self.static:
            positions = np.full((self.batch, 1), self.rows, np.int64)
            binding.bind_cpu_input("position_ids", positions)
            self._reserve(self.rows + 1)
            run(self.runtime, binding)
        else:
            for (past, _), value in zip(self._self_names, self._past, strict=True):
                binding.bind_ortvalue_input(past, value)
            for _, present in self._self_names:
                binding.bind_output(present, self.device, 0)
            run(self.runtime, binding)
            self._past = binding.get_outputs()[1:]
        return self._logits.read()[:, 0]

    def _reserve(self, need: int) -> None:
        if need <= self._held:
            return
        rows = next_rows(need, self._held, self.capacity + 1)
        self._held = 0  # until all are bound: what an interrupt leaves is not to be used
        self._caches = resized(self.variant, self._self_names, self.batch, rows, self.device, self._caches, self.rows)
        for (past, present), buffer in self._caches.items():
            buffer.bind(self._binding, past, present)
        self._held = rows

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
        self._past = []
        self._caches.clear()
        self._cross.clear()
        self.encoder = self.runtime = None


def _pairs(layer: int, stack: str) -> list[Names]:
    """Of K and of V."""
    return list(zip(names(PAST, layer, stack), names(PRESENT, layer, stack), strict=True))
