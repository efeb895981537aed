"""An opened checkpoint: its config, its weights as they lie in files, and the small files that travel with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
