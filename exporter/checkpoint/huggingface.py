"""Hugging Face folders: config.json and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from exporter.bundle import MANIFEST
from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.expected import check_tensors, expected_shapes, listing
from exporter.checkpoint.families import layout
from exporter.checkpoint.hf_config import parse_config, read_json
from exporter.checkpoint.safetensors_io import TORCH_DTYPES, Entry, read_header
from exporter.checkpoint.t5_config import settle_head
from exporter.checkpoint.t5_names import COPIES, HEAD, UNUSED
from exporter.checkpoint.t5_names import EMBEDDING as T5_EMBEDDING
from exporter.config import ModelConfig
from exporter.errors import CheckpointError
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import FileTensor, LazyTensor, Weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
# Buffers that old checkpoints saved along with their weights; they follow from the config.
NOT_WEIGHTS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

Found = Mapping[str, tuple[Path, Entry]]


def open_folder(folder: Path) -> Checkpoint:
    """Read config.json, the small files and the headers of the weight files. Raises CheckpointError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} has no config.json; give a Hugging Face folder, or a .gguf file by its own name")
    hf_config = read_json(config_file)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else None
    config = parse_config(hf_config, generation, config_file)
    try:
        files = weight_files(folder)
        found = tensors_in(files)
        if isinstance(config, Seq2SeqConfig):
            config = settle_head(config, hf_config, _has_own_head(found))
        weights = collect(folder, config, found)
    except CheckpointError:
        if (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder} is a bundle; give the checkpoint it was exported from") from None
        raise
    return Checkpoint(folder_name(folder), config, weights, hf_config, files, read_side_files(folder))


def folder_name(folder: Path) -> str:
    """The folder's own name, also where it is given as "." or through "..". A link keeps its name."""
    return Path(os.path.abspath(folder)).name


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Those of SIDE_FILES that the folder has."""
    try:
        return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}") from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder: model.safetensors, or the shards its index names."""
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        if any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{folder} has its weights in pytorch_model.bin only, which can run code when it is read; save it as "
                "safetensors with transformers' save_pretrained"
            )
        raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or "\\" in name or "\0" in name or name in ("", "..")]:
        raise CheckpointError(f"{folder / INDEX} names {listing(outside)}, which is not a file name in its own folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} shards: {listing(missing)}; download them again")
    held = {name: read_header(folder / name) for name in names}
    if absent := sorted(tensor for tensor, name in weight_map.items() if tensor not in held[name]):
        raise CheckpointError(f"{folder / INDEX} names tensors that its shards do not hold: {listing(absent)}")
    return tuple(folder / name for name in names)


def tensors_in(files: tuple[Path, ...]) -> dict[str, tuple[Path, Entry]]:
    """Every tensor of the files. One that two shards hold is refused."""
    found: dict[str, tuple[Path, Entry]] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in found:
                raise CheckpointError(f"tensor {name!r} stands in both {found[name][0]} and {path.name}")
            found[name] = (path, entry)
    return found


def collect(where: Path, config: ModelConfig, found: Found) -> Weights:
    """The canonical weights among `found`; fused tensors are taken apart by rows, so their bytes stay where they are."""
    expected = expected_shapes(config)
    wanted = layout(config)
    shapes = {name: (sum(expected[part][0] for part in parts), *expected[parts[0]][1:]) for name, parts in wanted.items()}
    embedding = next(iter(wanted))
    seq2seq = isinstance(config, Seq2SeqConfig)
    copies = [name for name in (*[HEAD] * config.tied, *COPIES * seq2seq) if name in found]
    spare = {name for name in found if NOT_WEIGHTS.search(name) or name in copies or name in UNUSED * seq2seq}
    check_tensors(where, config.family, shapes, {name: found[name][1].shape for name in found if name not in spare})
    weights: dict[str, LazyTensor] = {}
    for name, parts in wanted.items():
        tensor = _file_tensor(name, *found[name])
        row = 0
        for part in parts:
            weights[part] = tensor.rows(row, row + expected[part][0], part)
            row += expected[part][0]
    for name in copies:
        if not _same(_file_tensor(name, *found[name]), weights[embedding]):
            hint = "; set it to false in config.json" if name == HEAD else ""
            why = "tie_word_embeddings is true" if name == HEAD else "the model has one embedding"
            raise CheckpointError(f"{where}: {name} differs from {embedding}, but {why}{hint}")
    return {name: weights[name] for name in expected}


def _file_tensor(name: str, path: Path, entry: Entry) -> FileTensor:
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} is {entry.dtype}; headpool reads {', '.join(TORCH_DTYPES)}")
    return FileTensor(name, TORCH_DTYPES[entry.dtype], entry.shape, path, entry.offset)


def _has_own_head(found: Found) -> bool:
    """Whether the folder holds a head that is not its embedding."""
    if HEAD not in found or T5_EMBEDDING not in found:
        return HEAD in found
    return not _same(_file_tensor(HEAD, *found[HEAD]), _file_tensor(T5_EMBEDDING, *found[T5_EMBEDDING]))


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Bit by bit: what is stored beside the embedding it is tied to must be that embedding; old files hold both."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        for mine, theirs in zip(one.blocks(), other.blocks(), strict=True)
    )
