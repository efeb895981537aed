"""The torch model itself as a session, over the static cache form: the reference that needs no graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from exporter.checkpoint import Checkpoint
from exporter.config import DTYPES
from exporter.engines.base import Session, SessionInfo, check_score
from exporter.engines.feeding import Feed, right_padded
from exporter.engines.torch_seq2seq import TorchSeq2SeqSession
from exporter.errors import EngineError, one_of
from exporter.models.decoder import Decoder
from exporter.models.seq2seq import Seq2Seq
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import TORCH_DTYPES


def open_torch(
    checkpoint: Checkpoint,
    *,
    dtype: str = "fp32",
    batch: int = 1,
    capacity: int | None = None,
    device: str = "cpu",
    chunk: int = 512,
    cache_dtype: str | None = None,
) -> TorchSession | TorchSeq2SeqSession:
    """Eager torch over a checkpoint's weights, read whole and cast to `dtype`; a decoder's cache as `cache_dtype` stores it."""
    if dtype not in DTYPES:
        raise EngineError(one_of("dtype", dtype, DTYPES))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(f"torch {torch.__version__} finds no CUDA device; choose device cpu")
    capacity = checkpoint.config.max_positions if capacity is None else capacity
    for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
        if value < 1:
            raise EngineError(f"{name} {value} is not a whole number from 1")
    if isinstance(checkpoint.config, Seq2SeqConfig):
        pair = Seq2Seq.from_weights(checkpoint.config, checkpoint.weights, TORCH_DTYPES[dtype]).to(device)
        return TorchSeq2SeqSession(pair, batch, capacity)
    model = Decoder.from_weights(checkpoint.config, checkpoint.weights, TORCH_DTYPES[dtype]).to(device)
    return TorchSession(model, batch, capacity, chunk, cache_dtype)


class TorchSession(Session):
    """A `Decoder` and caches [B, G, S, D] in its dtype, or stored as graphs/caches.py has it; S doubles up to `capacity`."""

    def __init__(self, model: Decoder, batch: int, capacity: int, chunk: int = 512, cache_dtype: str | None = None) -> None:
        weight = next(model.parameters())
        options = {"dtype": str(weight.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "chunk": chunk}
        info = SessionInfo("torch", str(weight.device), {"torch": torch.__version__}, options)
        super().__init__(model.config, batch, capacity, info)
        self.model, self.chunk, self.device = model, chunk, weight.device
        self._caches = model.empty_cache(batch, 0, cache_dtype)
        self._row_bytes = sum(rows.shape[1] * rows.shape[3] * rows.itemsize for pair in self._caches for rows in pair)

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        for feed in right_padded(prompts, self.lengths, self.capacity, self.chunk):
            logits = self._feed(feed)
        return logits[:, -1]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        return self._feed(Feed(tokens[:, None], self.lengths[:, None].copy(), np.ones_like(self.lengths)))[:, -1]

    def score(self, tokens: np.ndarray, skip: int = 0) -> Iterator[np.ndarray]:
        check_score(tokens, skip)
        self.check_prompts(list(tokens))
        seen = 0
        for feed in right_padded(list(tokens), self.lengths, self.capacity, self.chunk):
            logits = self._feed(feed)
            if seen + logits.shape[1] > skip:
                yield logits[:, max(skip - seen, 0) :]
            seen += logits.shape[1]

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        self.lengths[:] = length

    def close(self) -> None:
        self._caches = []

    @torch.inference_mode()
    def _feed(self, feed: Feed) -> np.ndarray:
        """One call: float32 logits [B, T, V]."""
        self._reserve(int(feed.positions.max()) + 1)
        ids, positions = (torch.from_numpy(array).to(self.device) for array in (feed.ids, feed.positions))
        logits, self._caches = self.model(ids, positions, self._caches)
        self.lengths += feed.counts
        return logits.float().cpu().numpy()

    def _reserve(self, need: int) -> None:
        rows = self._caches[0][0].shape[2]
        if need <= rows:
            return
        more = min(self.capacity, max(need, 2 * rows, 64)) - rows
        grow = torch.nn.functional.pad
        self._caches = [(grow(key, (0, 0, 0, more)), grow(value, (0, 0, 0, more))) for key, value in self._caches]

    def _kv_token_bytes(self) -> int:
        return self._row_bytes
