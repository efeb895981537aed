"""The tiny models of hf.py, saved to new folders, and logits: theirs by transformers, ours by headpool's decoder."""

from __future__ import annotations

import json
from pathlib import Path

import hf
import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.models.decoder import Decoder


@pytest.fixture(scope="session")
def models():
    """Each of hf.MODELS by name, made once."""
    return hf.model


@pytest.fixture
def saved(tmp_path):
    """Saves one of hf.MODELS to a new folder; keyword arguments go to save_pretrained."""

    def save(name: str, **options) -> Path:
        return hf.save(name, tmp_path, **options)

    return save


@pytest.fixture(scope="session")
def edit():
    """Changes keys of a folder's config.json, or removes the keys in `drop`."""

    def change(folder: Path, drop: tuple[str, ...] = (), **changes) -> Path:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
        return folder

    return change


TOKENS = torch.tensor([[1, 5, 60, 33, 17, 8, 21, 2, 44, 9, 13, 66, 3, 30, 7]])


@pytest.fixture(scope="session")
def their_logits():
    """A transformers model's logits [T,V] for TOKENS."""

    def run(model) -> torch.Tensor:
        with torch.no_grad():
            return model(TOKENS).logits[0]

    return run


@pytest.fixture(scope="session")
def our_logits():
    """The logits [T,V] of headpool's own decoder for TOKENS, with the checkpoint at a path."""

    def run(path: Path) -> torch.Tensor:
        checkpoint = open_checkpoint(path)
        decoder = Decoder.from_weights(checkpoint.config, checkpoint.weights)
        positions = torch.arange(TOKENS.shape[1])[None]
        return decoder(TOKENS, positions, decoder.empty_cache(1, TOKENS.shape[1]))[0][0]

    return run
