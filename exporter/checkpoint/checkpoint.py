"""An opened checkpoint: its config, its weights as they lie in files, and the small files that travel with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.config import ModelConfig
from exporter.weights import Weights


@dataclass(frozen=True)
class Checkpoint:
    """One model. `weights` holds exactly the tensors of `expected_shapes(config)`, in that order, none of them read yet."""

    name: str  # of the folder, or of the file without its suffix
    config: ModelConfig
    weights: Weights
    hf_config: dict[str, Any]  # config.json as Hugging Face writes it (made, for GGUF)
    files: tuple[Path, ...]  # the weight files; none for random weights
    side_files: Mapping[str, bytes]  # tokenizer, chat template and generation config, by file name

    def kv_digest(self) -> str:
        """sha256 (hex) of a decoder's K and V weights, which every conversion and every training changes: tells models of one
        shape apart, and reads a few hundredths of what a model has."""
        digest = hashlib.sha256()
        for layer in range(self.config.num_layers):
            for projection in ("k_proj", "v_proj"):
                for block in self.weights[f"model.layers.{layer}.self_attn.{projection}.weight"].blocks():
                    digest.update(block.view(torch.uint8).numpy().data)
        return digest.hexdigest()
