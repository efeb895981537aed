"""Plain torch at its best, as a session to hold engines against: SDPA with `enable_gqa`, one CUDA graph a decode step.

Nothing of a step depends on the device: the rows of the cache that are read and written are numbers of the captured graph, so
attention has no mask and runs in torch's flash kernel. A graph serves one length only, which is what a latency measurement
repeats; other lengths run eagerly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.config import ModelConfig
from exporter.engines.base import Session, SessionInfo
from exporter.engines.feeding import right_padded
from exporter.errors import EngineError
from exporter.models.decoder import Decoder, Layer
from exporter.models.rope import frequencies
from exporter.weights import TORCH_DTYPES

CHUNK = 512  # most tokens of one prefill call


def random_decoder(config: ModelConfig, dtype: str, device: str, seed: int = 0) -> Decoder:
    """A model with normal weights drawn on the device: for latency, where only shapes matter."""
    with torch.device(device):
        model = Decoder(config, TORCH_DTYPES[dtype], last_only=True).eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
    if model.prologue.rotary is not None:
        model.prologue.rotary.inv_freq = frequencies(config)[0].to(device)
    return model


class YardstickSession(Session):
    """B sequences of one length over caches [B, G, S, D]. `compiler` is a backend of torch.compile; None: eager kernels."""

    def __init__(self, model: Decoder, batch: int, capacity: int, compiler: str | None = None) -> None:
        weight = next(model.parameters())
        self.device = weight.device
        graph = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if graph else "cpu"
        options = {"compiler": compiler, "cuda_graph": graph, "chunk": CHUNK}
        super().__init__(model.config, batch, capacity, SessionInfo("torch", name, {"torch": torch.__version__}, options))
        config = model.config
        plain = config.glu_value_dim is None and not config.qk_norm
        if not plain or config.rope.kind == "none" or config.rotary_dim != config.head_dim:
            raise EngineError("the yardstick is for models that rotate whole heads (RoPE), without QK-norm and GLU attention")
        self.model, self._bytes = model, weight.dtype.itemsize
        self._caches = model.empty_cache(batch, capacity)
        self._ids, self._positions, self._logits = (
            torch.zeros((batch, size), dtype=dtype, pin_memory=graph)
            for size, dtype in ((1, torch.int64), (1, torch.int64), (model.config.vocab_size, torch.float32))
        )
        self._step: Callable[[Tensor, Tensor, int], Tensor] = self._forward
        if compiler is not None:
            self._step = torch.compile(self._forward, fullgraph=True, dynamic=False, backend=compiler)
        self._stream = torch.cuda.Stream() if graph else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # the weights and caches are made there
        self._graph: torch.cuda.CUDAGraph | None = None
        self._length = -1  # of the cache at the last decode step, which the graph is for

    @torch.inference_mode()
    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        if len({len(prompt) for prompt in prompts}) > 1:
            raise EngineError("the yardstick takes prompts of one length only")
        with self._on_stream():
            for feed in right_padded(prompts, self.lengths, self.capacity, CHUNK):
                ids, positions = (torch.from_numpy(array).to(self.device) for array in (feed.ids, feed.positions))
                logits = self._forward(ids, positions, int(feed.positions[0, 0]))
                self.lengths += feed.counts
            return logits.float().cpu().numpy()

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        length = int(self.lengths[0])
        self._ids.numpy()[:, 0], self._positions[:] = tokens, length
        with self._on_stream():
            if self._graph is not None and length == self._length:
                self._graph.replay()
            else:
                self._enqueue(length)
                self._graph = self._capture(length) if self._stream is not None and length == self._length else None
            self._length = length
        if self._stream is not None:
            self._stream.synchronize()
        self.lengths += 1
        return self._logits.numpy()

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        self.lengths[:] = length

    def close(self) -> None:
        self._graph, self._caches = None, []

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _enqueue(self, length: int) -> None:
        """Copy in, run, copy out."""
        ids, positions = (host.to(self.device, non_blocking=True) for host in (self._ids, self._positions))
        self._logits.copy_(self._step(ids, positions, length).float(), non_blocking=True)

    def _capture(self, length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue(length)
        return graph

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor, start: int) -> Tensor:
        """Tokens of the cache rows `start` … start + T → logits [B, V] of the last."""
        model, (B, T) = self.model, ids_BT.shape
        end, mask = start + T, None
        if T > 1:
            mask = torch.ones((T, end), dtype=torch.bool, device=self.device).tril(start)
        x, cos, sin = model.prologue(ids_BT, positions_BT)
        for layer, (keys, values) in zip(model.layers, self._caches, strict=True):
            assert isinstance(layer, Layer)
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            query, key, value = (
                product(normed).view(B, T, heads, -1)
                for product, heads in (
                    (attention.q_proj, attention.num_heads),
                    (attention.k_proj, attention.kv_heads),
                    (attention.v_proj, attention.kv_heads),
                )
            )
            keys[:, :, start:end] = _rotate(key, cos, sin).transpose(1, 2)
            values[:, :, start:end] = value.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                _rotate(query, cos, sin).transpose(1, 2),
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=mask,
                scale=attention.scale,
                enable_gqa=True,
            )
            x = x + attention.o_proj(attended.transpose(1, 2).reshape(B * T, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        head = model.prologue.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        return model.epilogue(x, positions_BT, head)[:, -1]

    def _kv_token_bytes(self) -> int:
        return sum(self.config.kv_heads) * (self.config.head_dim + self.config.value_dim) * self._bytes


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """RoPE with half-split pairs (Su et al. 2021; channel i turns with i + D/2, as in Llama)."""
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    first, second = x_BTHD.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
