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
    """Caches of `capacity` rows that K and V of every step share, as its own configuration has it."""

    def __init__(self, model: Path, capacity: int, threads: int) -> None:
        import onnxruntime_genai as og

        path = model / "genai_config.json"
        settings = json.loads(path.read_text("utf-8"))
        settings["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads}
        path.write_text(json.dumps(settings), "utf-8")
        self.vocabulary: int = settings["model"]["vocab_size"]
        self.model = og.Model(str(model))
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=capacity, do_sample=False)
        self.generator = og.Generator(self.model, parameters)
        self.versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
        self.options = {"threads": threads}

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        self.generator.append_tokens(tokens.astype(np.int32))
        return np.asarray(self.generator.get_logits()).reshape(-1, self.vocabulary)[-1]

    def rewind(self, length: int) -> None:
        self.generator.rewind_to(length)
