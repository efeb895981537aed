"""OpenVINO: optimum-intel's export, run as OpenVINO GenAI runs it, the cache a state of the compiled model."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from profiles.peers.runner import Runner

INT4 = ("--weight-format", "int4", "--sym", "--group-size", "32")
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "PERFORMANCE_HINT": "LATENCY"}


def export(checkpoint: Path, out: Path, weights: str) -> None:
    """int4 with that tool's defaults for the rest: the embedding and the output head are int8."""
    format = INT4 if weights == "int4" else ("--weight-format", "fp32")
    tool = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    subprocess.run([*tool, "-m", str(checkpoint), "--task", "text-generation-with-past", *format, str(out)], check=True)


class Peer(Runner):
    """To forget tokens, every layer's state is read, cut and set again: once a burst, before the untimed steps of the next."""

    def __init__(self, model: Path, batch: int, capacity: int, threads: int) -> None:
        import openvino as ov

        self.ov = ov
        settings = SETTINGS | {"INFERENCE_NUM_THREADS": threads}
        self.request = ov.Core().compile_model(model / "openvino_model.xml", "CPU", settings).create_infer_request()
        self.versions = {name: version(name) for name in ("openvino", "optimum-intel", "nncf")}
        self.options = {"threads": threads, "KV": "f32", "attention": "SDPA"}
        self.beams = np.arange(batch, dtype=np.int32)  # every sequence goes on from itself
        self.length = 0

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        batch, total = len(tokens), self.length + tokens.shape[1]
        self.request.infer(
            {
                "input_ids": tokens,
                "attention_mask": np.ones((batch, total), np.int64),
                "position_ids": np.broadcast_to(np.arange(self.length, total), tokens.shape).copy(),
                "beam_idx": self.beams,
            },
            share_inputs=True,
        )
        self.length = total
        logits: np.ndarray = self.request.get_tensor("logits").data[:, -1]
        return logits

    def rewind(self, length: int) -> None:
        if not length:
            self.request.reset_state()
        elif length < self.length:
            for state in self.request.query_state():
                state.state = self.ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self.length = length
