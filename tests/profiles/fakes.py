"""A clock that only moves when told, and sessions that move it by known times and write down what is asked of them."""

from __future__ import annotations

import gc

import numpy as np

from exporter.config import ModelConfig
from exporter.engines.base import Session, SessionInfo

PICK = 0.5

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, kv_heads=(2,), head_dim=4, intermediate_size=8, max_positions=9999
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.drift = 1.0  # what a step takes is multiplied by it, and it grows with every step

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.drift


class Logits(np.ndarray):
    """Zeros that take PICK seconds to look through."""

    def __new__(cls, shape, clock):
        made = np.zeros(shape, np.float32).view(cls)
        made.clock = clock
        return made

    def argmax(self, *arguments, **options):
        self.clock.spend(PICK)
        return np.asarray(self).argmax(*arguments, **options)


class FakeSession(Session):
    def __init__(self, name: str, clock: Clock, log: list, batch: int, capacity: int, step: float = 0.01) -> None:
        info = SessionInfo("fake", "cpu", {"fake": "1"}, {"threads": 1})
        super().__init__(CONFIG, batch, capacity, info)
        self.name, self.clock, self.log, self.step, self.growth = name, clock, log, step, 0.0
        self.log.append((name, "open"))

    def prefill(self, prompts):
        self.check_prompts(prompts)
        self.lengths += [len(prompt) for prompt in prompts]
        self.clock.spend(self.step * len(prompts[0]))
        self.log.append((self.name, "prefill"))
        return Logits((self.batch, CONFIG.vocab_size), self.clock)

    def decode(self, tokens):
        assert not gc.isenabled()
        self.check_decode(tokens)
        self.clock.spend(self.step)
        self.clock.drift += self.growth
        self.log.append((self.name, int(self.lengths[0])))
        self.lengths += 1
        return np.zeros((self.batch, CONFIG.vocab_size), np.float32)

    def rewind(self, length):
        self.check_rewind(length)
        self.clock.spend(5.0)  # what must never be in a sample
        self.lengths[:] = length

    def close(self):
        self.log.append((self.name, "close"))

    def _kv_token_bytes(self):
        return 64


def opener(name: str, clock: Clock, log: list, step: float = 0.01, growth: float = 0.0):
    def open_session(*, batch, capacity, profile_to=None):
        session = FakeSession(name, clock, log, batch, capacity, step)
        session.growth = growth
        return session

    return open_session
