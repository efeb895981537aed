"""onnxruntime-genai: its model builder for the CPU, its Generator."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from profiles.peers.runner import Runner

INT4 = ("int4_block_size=32", "int4_is_symmetric=true", "int4_accuracy_level=4")


def export(checkpoint: Path, out: Path, weights: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out), "-e", "cpu"]
    extra = ["--extra_options", *INT4] if weights == "int4" else []
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run([*builder, "-p", weights, "-c", cache, *extra], check=True)


class Peer(Runner):
    """Caches of `capacity` rows that K and V of every step share, as its own configuration has it.

    A batch takes a prompt once, and can forget all or nothing. Later tokens are then what it draws: from logits of ours, which
    leave it no choice. To forget some, it forgets all and reads the prompt again, which takes seconds, and so `slack`.
    """

    def __init__(self, model: Path, batch: int, capacity: int, threads: int) -> None:
        import onnxruntime_genai as og

        path = model / "genai_config.json"
        settings = json.loads(path.read_text("utf-8"))
        settings["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads}
        path.write_text(json.dumps(settings), "utf-8")
        self.slack = 0.02 if batch > 1 else 0.0
        self.batch, self.vocabulary = batch, int(settings["model"]["vocab_size"])
        self.model = og.Model(str(model))
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=batch, max_length=int(capacity * (1 + self.slack)), do_sample=False)
        self.generator = og.Generator(self.model, parameters)
        self.fed = np.empty((batch, 0), np.int32)
        self.choice = np.zeros((batch, self.vocabulary), np.float32)
        self.versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
        self.options = {"threads": threads, "slack": self.slack}

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        whole = self.batch == 1 or not self.fed.shape[1]
        self.fed = np.concatenate([self.fed, tokens.astype(np.int32)], axis=1)
        add, parts = (self._append, [tokens]) if whole else (self._draw, np.split(tokens, tokens.shape[1], axis=1))
        for part in parts:
            add(part)
            logits = np.asarray(self.generator.get_logits())
        return logits.reshape(self.batch, -1, self.vocabulary)[:, -1]

    def _append(self, tokens: np.ndarray) -> None:
        self.generator.append_tokens(tokens.astype(np.int32).ravel())

    def _draw(self, tokens: np.ndarray) -> None:
        np.put_along_axis(self.choice, tokens, 1, axis=1)
        self.generator.set_logits(self.choice)
        self.generator.generate_next_token()
        np.put_along_axis(self.choice, tokens, 0, axis=1)

    def rewind(self, length: int) -> None:
        if self.batch == 1 or not length:
            self.generator.rewind_to(length)
            self.fed = self.fed[:, :length]
        elif length < self.fed.shape[1]:
            kept = self.fed[:, :length]
            self.rewind(0)
            self.feed(kept)
