"""Two TensorRT engines as a session of an encoder-decoder: what cross-attention reads never leaves the GPU.

The encoder writes it, once an input, where the decoder reads it. A step is then as a decoder's, one token a sequence over
caches written in place, captured anew where an input has another length than the last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from exporter.bundle import Seq2SeqVariant
from exporter.contract_seq2seq import names
from exporter.engines.base import SessionInfo
from exporter.engines.seq2seq import Seq2SeqSession
from exporter.engines.tensorrt.loaded import Loaded, Step, Times, bind_caches, pinned, write_times, zeros
from exporter.engines.tensorrt.parts import shape
from exporter.errors import EngineError
from exporter.weights import TORCH_DTYPES


class TensorRTSeq2SeqSession(Seq2SeqSession):
    """B inputs of at most the engines' `prefill` tokens; caches [B, G, S, D] of their capacity S."""

    def __init__(
        self,
        encoder: Loaded,
        decoder: Loaded,
        variant: Seq2SeqVariant,
        capacity: int,
        info: SessionInfo,
        profile_to: Path | None = None,
    ) -> None:
        recipe = decoder.record.recipe
        super().__init__(variant.config, recipe.batch, capacity, info)
        self.variant, self.longest, self.messages = variant, recipe.prefill, encoder.messages
        self.stream = torch.cuda.Stream()
        self.profile: Path | None = None  # where the decoder's layer times were written, after close()
        self._profile_to = profile_to
        self._times: Times | None = None if profile_to is None else []
        self._tokens = 0  # of the inputs that the contexts are set to
        most = {"batch": self.batch, "encoder": self.longest}
        with torch.cuda.stream(self.stream):
            source = [shape(binding, most) for binding in variant.encoder_inputs()]
            self._host = [pinned(size, torch.int64).view(-1) for size in source]  # as in memory: ids, mask
            self._source = [zeros(size, torch.int64).view(-1) for size in source]
            self._made = {b.name: zeros(shape(b, most), TORCH_DTYPES[b.dtype]) for b in variant.encoder_outputs()}
            self._caches = decoder.caches()
            self._encoder = encoder.context(0, self.stream, None)
            self._decoder = decoder.context(0, self.stream, self._times, graph=True)
            self._bind()
            self._step_call = Step(decoder, self._decoder, variant, self._times)
        self.stream.synchronize()

    def check_prompts(self, prompts: list[np.ndarray]) -> None:
        super().check_prompts(prompts)
        for row, prompt in enumerate(prompts, 1):
            if len(prompt) > self.longest:
                raise EngineError(
                    f"input {row} of the encoder has {len(prompt)} tokens, its engine takes {self.longest}; "
                    f"headpool build … --prefill {len(prompt)}"
                )

    def close(self) -> None:
        if self._encoder is None:
            return
        self.stream.synchronize()
        if self._profile_to is not None and self._times is not None:
            self.profile = write_times(self._profile_to, self._times, self._step_call.loaded.nodes())
        del self._step_call
        self._encoder = self._decoder = None
        self._caches.clear()
        self._made.clear()

    def _bind(self) -> None:
        """Every tensor has room for the longest input; a shorter one takes the front of it."""
        bind_caches(self._decoder, self._caches)
        for binding, tensor in zip(self.variant.encoder_inputs(), self._source, strict=True):
            self._encoder.set_tensor_address(binding.name, tensor.data_ptr())
        for name, tensor in self._made.items():
            self._encoder.set_tensor_address(name, tensor.data_ptr())
        self._decoder.set_tensor_address("encoder_attention_mask", self._source[1].data_ptr())
        for layer in range(self.config.num_layers):
            for past, present in zip(*(names(kind, layer, "encoder") for kind in ("past_key_values", "present")), strict=True):
                self._decoder.set_tensor_address(past, self._made[present].data_ptr())

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> None:
        if (tokens := ids.shape[1]) != self._tokens:
            self._reshape(tokens)
        with torch.cuda.stream(self.stream):
            for given, host, device in zip((ids, mask), self._host, self._source, strict=True):
                host[: given.size].copy_(torch.from_numpy(given.reshape(-1)))
                device[: given.size].copy_(host[: given.size], non_blocking=True)
            if not self._encoder.execute_async_v3(self.stream.cuda_stream):
                raise EngineError(f"TensorRT failed in the encoder: {self.messages.reason()}")

    def _reshape(self, tokens: int) -> None:
        """Both contexts for inputs of `tokens` tokens."""
        self._tokens, sizes = 0, {"batch": self.batch, "encoder": tokens}  # 0: until all shapes are set
        for context, bindings in ((self._encoder, self.variant.encoder_inputs()), (self._decoder, self.variant.inputs())):
            for binding in bindings:
                if "encoder" in binding.shape and not context.set_input_shape(binding.name, shape(binding, sizes)):
                    raise EngineError(f"TensorRT takes no inputs of {tokens} tokens: {self.messages.reason()}")
        self._step_call.forget()
        self._tokens = tokens

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        self._step_call.host_ids.numpy()[:, 0] = tokens
        self._step_call.host_positions.numpy()[:, 0] = self.rows
        return self._step_call.run(self.stream)[:, 0]

    def _keep(self) -> None:
        pass  # later rows are overwritten before they are seen

    def _forget(self) -> None:
        pass

    def _kv_token_bytes(self) -> int:
        return self.variant.kv_bytes_per_token
