"""A runtime for tests of profiles.peers: a module as its workers import them, run in a process of its own or in this one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from profiles.peers.runner import Runner

VOCABULARY = 50


def export(checkpoint: Path, out: Path, weights: str) -> None:
    if weights != "fp32":
        raise RuntimeError(f"no {weights} here")
    out.write_text(str(checkpoint))


class Peer(Runner):
    """Writes what it is asked to the file `model`; logits say which tokens it holds.

    Alone at the start, token 13 kills it and 14 is refused.
    """

    def __init__(self, model: Path, batch: int, capacity: int, threads: int, name: str = "fake") -> None:
        print("a runtime that talks")
        os.write(1, b"and its library, too\n")
        self.file, self.name, self.tokens = model, name, np.empty((batch, 0), np.int64)
        self.versions, self.options = {"fake": "1.0"}, {"threads": threads, "capacity": capacity}

    def note(self, what: object) -> None:
        with open(self.file, "a") as file:
            file.write(f"{self.name} {what}\n")

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        assert tokens.dtype == np.int64
        if not self.tokens.size and tokens.tolist() == [[13]]:
            os._exit(3)
        if not self.tokens.size and tokens.tolist() == [[14]]:
            raise ValueError("not\n14")
        self.tokens = np.concatenate([self.tokens, tokens], axis=1)
        self.note(self.tokens.shape[1])
        return np.stack([np.bincount(row, minlength=VOCABULARY) for row in self.tokens]).astype(np.float32)

    def rewind(self, length: int) -> None:
        assert length <= self.tokens.shape[1]
        self.tokens = self.tokens[:, :length]
        self.note(f"rewind {length}")
