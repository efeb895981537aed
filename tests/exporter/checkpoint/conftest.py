"""Tiny models of every family with large random weights, made and saved by transformers itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.models.decoder import Decoder

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION_BIAS = {"attention_bias": True}
# name → (model_type, what differs from SIZES)
MODELS = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha-gelu": ("llama", {"num_key_value_heads": 6, "hidden_act": "gelu", "head_dim": 12}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rope_theta": 5000.0}),
    "llama-llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, "hidden_act": "relu"},
    ),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": False,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biased": ("qwen3", {"head_dim": 8, **ATTENTION_BIAS}),
    "gemma": ("gemma", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 3}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
}


def make(name: str, seed: int = 0):
    """A transformers model of float32: matrices normal with standard deviation 0.5, vectors 0.3 around what they start as."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval().requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.5 if parameter.dim() > 1 else parameter + noise * 0.3)
    return model


@pytest.fixture(scope="session")
def models():
    """Each of MODELS by name, made once."""
    return cache(make)


@pytest.fixture
def saved(models, tmp_path):
    """Saves one of MODELS to a new folder; keyword arguments go to save_pretrained."""

    def save(name: str, **options) -> Path:
        folder = tmp_path / f"saved-{name}"
        models(name).save_pretrained(folder, **options)
        return folder

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
