"""Checkpoint → Hugging Face folder in the names of its family, streamed tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.expected import check_tensors, expected_shapes
from exporter.checkpoint.families import layout
from exporter.checkpoint.hf_config import hf_config_for
from exporter.checkpoint.huggingface import INDEX, SINGLE
from exporter.checkpoint.safetensors_io import write_safetensors
from exporter.files import new_folder
from exporter.weights import LazyTensor, cast

MAX_SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}  # transformers asks for it


@dataclass(frozen=True, eq=False)
class StackedTensor(LazyTensor):
    """Tensors of one dtype on top of each other along the first dimension: a fused projection."""

    parts: tuple[LazyTensor, ...]

    def read(self) -> torch.Tensor:
        return torch.cat([part.read() for part in self.parts])

    def blocks(self) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from part.blocks()


def write_checkpoint(
    checkpoint: Checkpoint,
    out: Path | str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a folder that transformers loads, with `checkpoint.config`'s number of KV heads. `out` must not exist.

    A shard holds at most `max_shard_bytes` bytes of weights, or one tensor. Tensors keep their dtypes. Raises
    CheckpointError, and then leaves nothing: for NaN weights, a full disk.
    """
    config = checkpoint.config
    check_tensors(
        checkpoint.name,
        config.family,
        expected_shapes(config),
        {name: tensor.shape for name, tensor in checkpoint.weights.items()},
    )
    tensors = family_tensors(checkpoint)
    hf_config = hf_config_for(config, checkpoint.hf_config, next(iter(checkpoint.weights.values())).dtype)
    shards = _shards(tensors, max_shard_bytes)
    with new_folder(Path(out)) as folder:
        for name, data in checkpoint.side_files.items():
            (folder / name).write_bytes(data)
        _write_json(folder / "config.json", hf_config)
        if len(shards) == 1:
            write_safetensors(folder / SINGLE, tensors, metadata=METADATA, on_bytes=on_bytes)
            return
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder / name, shard, metadata=METADATA, on_bytes=on_bytes)
            weight_map.update(dict.fromkeys(shard, name))
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def family_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The weights under the names of the family's own checkpoints, fused where the family fuses."""
    return {
        name: checkpoint.weights[parts[0]] if len(parts) == 1 else _stack(name, [checkpoint.weights[part] for part in parts])
        for name, parts in layout(checkpoint.config).items()
    }


def _stack(name: str, parts: list[LazyTensor]) -> StackedTensor:
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return StackedTensor(name, dtype, shape, tuple(cast(part, dtype) for part in parts))


def _shards(tensors: dict[str, LazyTensor], max_bytes: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
