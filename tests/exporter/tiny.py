"""A tiny decoder with large random weights, as torch model and as a bundle with its weights inside the graph."""

from __future__ import annotations

from functools import cache as memo
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from exporter import contract
from exporter.bundle import Bundle, Variant
from exporter.config import CacheForm, ModelConfig, RopeConfig
from exporter.models.decoder import Decoder, canonical_to_module
from exporter.trace import canonical_graph
from exporter.weights import TORCH_DTYPES
from graphs.lower import lower

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    num_layers=2,
    num_heads=6,
    kv_heads=(2, 3),
    head_dim=16,
    intermediate_size=40,
    max_positions=400,
    rope=RopeConfig(theta=100.0),
)

# Another, as a checkpoint's config.json.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def decoder(config: ModelConfig = CONFIG) -> Decoder:
    generator = torch.Generator().manual_seed(5)
    model = Decoder(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model


@memo
def canonical(config: ModelConfig, cache: CacheForm, dtype: str, logits: contract.Logits) -> ir.Model:
    """Traced once for all patterns."""
    return canonical_graph(config, cache, dtype, logits)


def bundle(
    folder: Path,
    model: Decoder,
    pattern: str = "grouped",
    cache: CacheForm = "static",
    dtype: str = "fp32",
    logits: contract.Logits = "last",
) -> Bundle:
    """A bundle of one variant, opened without a manifest."""
    graph = lower(canonical(model.config, cache, dtype, logits), pattern)
    state = model.state_dict()
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            tensor = state[canonical_to_module(name)].to(TORCH_DTYPES[dtype])
            array = tensor.view(torch.uint16).numpy() if dtype == "bf16" else tensor.numpy()
            value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    file = f"{pattern}.{cache}.{dtype}.{logits}.onnx"
    ir.save(graph, folder / file)
    variant = Variant("v", file, model.config, pattern, cache, dtype, logits, (), 0)
    return Bundle(folder, (variant,))


# Absolute, of fp16 logits against float32's: torch's own fp16 decoder is up to 0.0018 off for the prompts of these tests.
HALF = 4 * 0.0018


def full_logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """float32 [n, V]: the whole sequence at once, with no cache kept."""
    ids = torch.from_numpy(tokens)[None]
    logits, _ = model(ids, torch.arange(len(tokens))[None], model.empty_cache(1, len(tokens)))
    return logits[0].numpy()
