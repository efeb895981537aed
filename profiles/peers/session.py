"""A runtime in its own process as a session: profiles.measure takes it like one of headpool's."""

from __future__ import annotations

import numpy as np

from exporter.config import ModelConfig
from exporter.engines.base import Session, SessionInfo
from profiles.peers.process import WorkerProcess


class PeerSession(Session):
    """B sequences in step over a worker that has opened its model: prompts of one length. `close` ends the process.

    It takes its times where the runtime runs (see measure.TimesItself): what the pipes cost is in none of them.
    """

    def __init__(self, worker: WorkerProcess, config: ModelConfig, batch: int, capacity: int, info: SessionInfo) -> None:
        super().__init__(config, batch, capacity, info)
        self.worker = worker

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        return self._feed(np.stack(prompts))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        return self._feed(tokens[:, None])

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        self.worker.ask("rewind", length=length)
        self.lengths[:] = length

    def timed_prefill(self, prompts: list[np.ndarray]) -> dict[str, float]:
        self.lengths[:] = 0
        self.check_prompts(prompts)
        seconds = self.worker.ask("prefill", tokens=np.stack(prompts).tolist())
        self.lengths[:] = len(prompts[0])
        return seconds

    def timed_steps(self, tokens: np.ndarray, settle: int, count: int) -> list[float]:
        self.check_decode(tokens)
        seconds: list[float] = self.worker.ask("steps", tokens=tokens.tolist(), settle=settle, count=count)["seconds"]
        return seconds

    def close(self) -> None:
        self.worker.close()

    def _feed(self, tokens: np.ndarray) -> np.ndarray:
        """Of int64 [B, T]."""
        logits = self.worker.ask("feed", tokens=tokens.tolist())["logits"]
        self.lengths += tokens.shape[1]
        return np.array(logits, np.float32)

    def _kv_token_bytes(self) -> int:
        return self.config.kv_bytes_per_token("fp32")
