"""The torch encoder-decoder itself as a session, over the static cache form: the reference that needs no graph."""

from __future__ import annotations

import numpy as np
import torch

from exporter.engines.base import SessionInfo
from exporter.engines.seq2seq import Seq2SeqSession
from exporter.models.decoder import Cache
from exporter.models.seq2seq import Seq2Seq


class TorchSeq2SeqSession(Seq2SeqSession):
    """A `Seq2Seq` and self-attention caches [B, G, S, D] in its dtype; S doubles."""

    def __init__(self, model: Seq2Seq, batch: int, capacity: int) -> None:
        weight = model.shared.weight
        options = {"dtype": str(weight.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        info = SessionInfo("torch", str(weight.device), {"torch": torch.__version__}, options)
        super().__init__(model.config, batch, capacity, info)
        self.model, self.device = model, weight.device
        self._past, self._cross = model.empty_cache(batch, 64), list[Cache]()
        self._mask = torch.zeros(batch, 0)

    @torch.inference_mode()
    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> None:
        self._mask = torch.from_numpy(mask).to(self.device)
        self._cross = self.model.cross_caches(self.model.encode(torch.from_numpy(ids).to(self.device), self._mask))

    @torch.inference_mode()
    def _step(self, tokens: np.ndarray) -> np.ndarray:
        if self.rows == (held := self._past[0][0].shape[2]):
            grow = torch.nn.functional.pad
            self._past = [(grow(key, (0, 0, 0, held)), grow(value, (0, 0, 0, held))) for key, value in self._past]
        ids = torch.from_numpy(tokens).to(self.device)[:, None]
        positions = torch.full_like(ids, self.rows)
        logits, self._past = self.model(ids, positions, self._past, self._cross, self._mask)
        return logits[:, -1].float().cpu().numpy()

    def _keep(self) -> None:
        pass  # later rows are overwritten before they are seen

    def _forget(self) -> None:
        self._cross = []

    def _kv_token_bytes(self) -> int:
        sizes = self.config.head_dim + self.config.value_dim
        return sum(self.config.kv_heads) * sizes * self.model.shared.weight.dtype.itemsize
