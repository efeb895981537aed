"""Checkpoints: Hugging Face folders and GGUF files in, Hugging Face folders out."""

from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.expected import expected_shapes
from exporter.checkpoint.hf_config import hf_config_for
from exporter.checkpoint.open import open_checkpoint, open_source
from exporter.checkpoint.safetensors_io import check_finite, scan, stored_dtype, write_safetensors
from exporter.checkpoint.writer import write_checkpoint

__all__ = [
    "Checkpoint",
    "check_finite",
    "expected_shapes",
    "hf_config_for",
    "open_checkpoint",
    "open_source",
    "scan",
    "stored_dtype",
    "write_checkpoint",
    "write_safetensors",
]
