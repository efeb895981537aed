"""optimum-onnx: its export, and ORTModelForCausalLM called as `generate` calls it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from profiles.peers.runner import Runner


def export(checkpoint: Path, out: Path, weights: str) -> None:
    """int4 is ONNX Runtime's own quantizer on that export, as optimum has none for fewer than 8 bits."""
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), output=str(out), task="text-generation-with-past", device="cpu", do_validation=False)
    if weights == "fp32":
        return
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    path = out / "model.onnx"
    quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    for file in out.glob("model.onnx*"):
        file.unlink()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


PIECE = 4096


class Peer(Runner):
    """Concat caches: each step's output is the next one's input. To forget tokens is to take an earlier step's caches.

    Prompts of more than PIECE tokens, all sequences together, are fed in pieces: it holds scores and logits of every token.
    """

    def __init__(self, model: Path, batch: int, capacity: int, threads: int) -> None:
        import torch
        from onnxruntime import SessionOptions
        from optimum.onnxruntime import ORTModelForCausalLM

        self.torch = torch
        options = SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(model, session_options=options)
        self.versions = {name: version(name) for name in ("optimum-onnx", "onnxruntime", "transformers")}
        self.options = {"threads": threads, "io binding": bool(self.model.use_io_binding)}
        self.length = 0
        self.past: Any = None
        self.kept: dict[int, Any] = {}  # caches by their length

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        piece = max(1, PIECE // len(tokens))
        for start in range(0, tokens.shape[1], piece):
            logits = self._feed(tokens[:, start : start + piece])
        if tokens.shape[1] > 1:
            self.kept[self.length] = self.past
        return logits

    def _feed(self, tokens: np.ndarray) -> np.ndarray:
        torch, batch, total = self.torch, len(tokens), self.length + tokens.shape[1]
        with torch.inference_mode():
            made = self.model(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.ones(batch, total, dtype=torch.int64),
                position_ids=torch.arange(self.length, total).expand(tokens.shape),
                past_key_values=self.past,
                use_cache=True,
            )
        self.length, self.past = total, made.past_key_values
        logits: np.ndarray = made.logits[:, -1].numpy()
        return logits

    def rewind(self, length: int) -> None:
        self.kept = {rows: caches for rows, caches in self.kept.items() if rows <= length}
        self.length, self.past = length, self.kept[length] if length else None
