"""Which reader a path needs."""

from __future__ import annotations

from pathlib import Path

from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.gguf_llama import open_gguf
from exporter.checkpoint.huggingface import open_folder
from exporter.checkpoint.random_weights import open_config
from exporter.errors import CheckpointError

FORMS = "a Hugging Face folder (config.json and safetensors) or a .gguf file"


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file. Only headers are read. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give {FORMS}")
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder; give {FORMS}")
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{path} is a weight file; give the folder that holds it and its config.json")
    raise CheckpointError(f"{path} is not a checkpoint; give {FORMS}")


def open_source(path: Path | str, seed: int = 0) -> Checkpoint:
    """What `open_checkpoint` opens, or a config.json file, which gets random weights from `seed`."""
    path = Path(path)
    if path.suffix.lower() == ".json" and path.is_file():
        return open_config(path, seed)
    return open_checkpoint(path)
