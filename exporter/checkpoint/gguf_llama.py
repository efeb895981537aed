"""GGUF files of the llama family → Checkpoint.

llama.cpp stores the rows of Q and K so that the two channels of a RoPE pair stand side by side; the canonical order keeps
the first half of every head's channels before the second. `GgufTensor` puts them back. Types that are not F32, F16 or BF16 are
dequantised to float32 when they are read, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.expected import check_tensors, expected_shapes
from exporter.checkpoint.gguf_config import hf_config_from
from exporter.checkpoint.gguf_file import GgufEntry, GgufFile, read_gguf
from exporter.checkpoint.gguf_tokenizer import side_files_from
from exporter.checkpoint.hf_config import parse_config
from exporter.config import ModelConfig
from exporter.errors import CheckpointError
from exporter.weights import BLOCK_BYTES, FileTensor, LazyTensor, Weights

NATIVE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# GGUF module ↔ canonical module; those of a layer stand under blk.N and model.layers.N.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NAMES = {canonical: name for name, canonical in NAMES.items()}
ROPE_FACTORS = "rope_freqs.weight"  # read by gguf_config


@dataclass(frozen=True, eq=False)
class GgufTensor(LazyTensor):
    """A tensor that has to be computed from its bytes. `heads` > 0: its rows are those of Q or K, in llama.cpp's order."""

    path: Path
    entry: GgufEntry
    heads: int

    def read(self) -> torch.Tensor:
        return torch.cat(list(self.blocks())).reshape(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        head_rows = rows // self.heads if self.heads else 1
        step = head_rows * max(1, BLOCK_BYTES // (4 * columns * head_rows))
        row_bytes = self.entry.nbytes // rows
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw = FileTensor(
                self.name, torch.uint8, (count, row_bytes), self.path, self.entry.offset + start * row_bytes
            ).read()
            values = self._values(raw).reshape(count, columns)
            if self.heads:
                values = values.reshape(-1, head_rows // 2, 2, columns).transpose(1, 2)
            yield values.reshape(-1)

    def _values(self, raw: torch.Tensor) -> torch.Tensor:
        if self.entry.kind in NATIVE:
            return raw.view(self.dtype)
        with np.errstate(all="ignore"):  # a damaged scale is found as NaN by whoever writes the tensor
            return torch.from_numpy(dequantize(raw.numpy(), self.entry.kind))


def open_gguf(path: Path) -> Checkpoint:
    """Read the header of a GGUF file of the llama family. Raises CheckpointError.

    The tokenizer becomes Hugging Face files where it is a byte-level BPE with a known pre-tokenizer; else `side_files` has no
    tokenizer.json, and the model runs on token ids only.
    """
    file = read_gguf(path)
    hf_config, generation = hf_config_from(file)
    config = parse_config(hf_config, generation, path)
    return Checkpoint(path.stem, config, _weights(file, config), hf_config, (path,), side_files_from(file, generation))


def _weights(file: GgufFile, config: ModelConfig) -> Weights:
    expected = expected_shapes(config)
    names = {name: gguf_name(name) for name in expected}
    found = {name: entry.shape for name, entry in file.tensors.items() if name != ROPE_FACTORS}
    check_tensors(file.path, "llama", {names[name]: shape for name, shape in expected.items()}, found)
    return {name: _tensor(file, config, name, file.tensors[names[name]]) for name in expected}


def _tensor(file: GgufFile, config: ModelConfig, name: str, entry: GgufEntry) -> LazyTensor:
    heads = config.num_heads if ".q_proj." in name else config.kv_heads[0] if ".k_proj." in name else 0
    if entry.kind in NATIVE and not heads:
        return FileTensor(name, NATIVE[entry.kind], entry.shape, file.path, entry.offset)
    if entry.kind not in NATIVE:
        if len(entry.shape) < 2:
            raise CheckpointError(f"{file.path}: tensor {gguf_name(name)!r} is {entry.kind.name}, in which only matrices come")
        _refuse_unreadable(file, name, entry.kind)
    return GgufTensor(name, NATIVE.get(entry.kind, torch.float32), entry.shape, file.path, entry, heads)


def _refuse_unreadable(file: GgufFile, name: str, kind: GGMLQuantizationType) -> None:
    """Types that the gguf package knows by size but cannot dequantise, and integers, which are no weights."""
    try:
        values: Any = dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # what the gguf package raises for them
        values = None
    if values is None:
        raise CheckpointError(f"{file.path}: tensor {gguf_name(name)!r} is {kind.name}, which cannot be dequantised here")


def gguf_name(name: str) -> str:
    """Canonical tensor name → its name in a llama GGUF file."""
    stem, kind = name.rsplit(".", 1)
    pieces = stem.split(".", 3)
    if pieces[:2] == ["model", "layers"]:
        return f"blk.{pieces[2]}.{GGUF_NAMES[pieces[3]]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"
