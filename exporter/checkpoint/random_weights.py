"""A bare config.json with random weights: for when only shapes matter."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.expected import expected_shapes
from exporter.checkpoint.hf_config import parse_config, read_json
from exporter.checkpoint.huggingface import GENERATION, folder_name, read_side_files
from exporter.config import ModelConfig
from exporter.errors import CheckpointError, one_of
from exporter.weights import LazyTensor

BLOCK_VALUES = 4 << 20
STD = 0.02  # the initializer_range of most families
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Files of headpool's own that are no config, by some of their keys, and what reads them.
OTHER_FILES = (
    (
        {"schema", "cells"},
        "a results file of 'headpool profile' or 'sweep'; read it with 'headpool report' or 'headpool compare'",
    ),
    ({"kv_heads", "kv_heads_before"}, "a plan of 'headpool select'; give it to convert, export or sweep with --plan"),
)


@dataclass(frozen=True, eq=False)
class RandomTensor(LazyTensor):
    """Normal values of standard deviation `std` around `mean`. They depend on the seed and the tensor's name only."""

    seed: int
    std: float
    mean: float = 0.0

    def read(self) -> torch.Tensor:
        return torch.cat(list(self.blocks())).reshape(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        # torch's CPU generator reads 32 bits of its seed, so both numbers go through one checksum.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.name}".encode()))
        count = math.prod(self.shape)
        for start in range(0, count, BLOCK_VALUES):
            size = min(BLOCK_VALUES, count - start)
            if self.std:
                yield torch.empty(size).normal_(self.mean, self.std, generator=generator).to(self.dtype)
            else:
                yield torch.full((size,), self.mean, dtype=self.dtype)


def open_config(path: Path, seed: int = 0) -> Checkpoint:
    """The model a config.json file describes, its weights drawn when they are read: the same ones for the same seed.

    Norms are one, biases zero, matrices normal with standard deviation 0.02, those that write to the residual stream less by
    √(2N) (GPT-2's rule), so that activations keep their size through N layers. A tokenizer beside the file is taken along.
    """
    if not 0 <= seed < 2**31:
        raise CheckpointError(f"seed {seed} is not a whole number from 0 to {2**31 - 1}")
    hf_config = read_json(path)
    for keys, what in OTHER_FILES:
        if keys <= hf_config.keys():
            raise CheckpointError(f"{path} is {what}")
    folder = path.parent
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else None
    config = parse_config(hf_config, generation, path)
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {one_of('dtype', dtype, DTYPES)}")
    weights = random_weights(config, DTYPES[dtype], seed)
    name = path.stem if path.stem != "config" else folder_name(folder)
    return Checkpoint(name, config, weights, hf_config, (), read_side_files(folder))


def random_weights(config: ModelConfig, dtype: torch.dtype, seed: int) -> dict[str, LazyTensor]:
    """What `open_config` draws for `config`: a tensor depends on the seed, its name, its shape and its dtype alone."""
    return {name: _tensor(config, name, shape, dtype, seed) for name, shape in expected_shapes(config).items()}


def _tensor(config: ModelConfig, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> LazyTensor:
    if name.endswith(".bias"):
        return RandomTensor(name, dtype, shape, seed, 0.0)
    if len(shape) == 1:
        return RandomTensor(name, dtype, shape, seed, 0.0, 0.0 if config.norm_offset else 1.0)
    to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return RandomTensor(name, dtype, shape, seed, STD / math.sqrt(2 * config.num_layers) if to_residual else STD)
