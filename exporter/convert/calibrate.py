"""Conversion on tokens: layer by layer, each one measured on what the layers converted before it make of them.

Two streams of hidden states run through the model, the original's and the converted one's, a layer's weights in memory at a
time: 2 · tokens · d floats, and of one layer the attention probabilities, windows · H · T² floats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.layer import LayerChange
from exporter.convert.refine import CausalAttention, Examples, refine, second_moments
from exporter.models.decoder import Layer
from exporter.weights import Weights

Progress = Callable[[str, int, int], None]  # what, done, total


@torch.no_grad()
def convert_on_tokens(
    config: ModelConfig, weights: Weights, target: ModelConfig, change: LayerChange, tokens: np.ndarray, progress: Progress
) -> dict[str, Tensor]:
    """The tensors that differ, by canonical name, in the dtypes of `weights`. tokens is int64 [n,T]: n windows."""
    windows = torch.from_numpy(tokens)
    attention = CausalAttention(config, windows.shape[1])
    original = weights["model.embed_tokens.weight"].read()[windows].float() * config.embed_scale
    converted = original.clone()
    changed: dict[str, Tensor] = {}
    for index, (before, after) in enumerate(zip(config.kv_heads, target.kv_heads, strict=True)):
        progress("converting layers", index, config.num_layers)
        block = _load_layer(config, weights, index)
        read, inputs = (_inputs(config, block, stream) for stream in (original, converted))
        layer = AttentionWeights.read(config, weights, index, torch.float32)
        if before == after:
            wanted = torch.stack([attention.attend(layer, window)[1] for window in read])
            given = torch.stack([attention.attend(layer, window)[1] for window in inputs])
        else:
            layer, folded, wanted = _convert(attention, config, layer, after, change, read, inputs)
            given = torch.stack([attention.attend(folded, window)[1] for window in inputs])
            named = folded.tensors(config, index)
            changed |= {name: tensor.to(weights[name].dtype).contiguous() for name, tensor in named.items()}
        bias = weights[name].read().float() if (name := f"model.layers.{index}.self_attn.o_proj.bias") in weights else 0.0
        original = _finish(block, original + wanted + bias)
        converted = _finish(block, converted + given + bias)
    progress("converting layers", config.num_layers, config.num_layers)
    return changed


def _convert(
    attention: CausalAttention,
    config: ModelConfig,
    layer: AttentionWeights,
    kv_heads: int,
    change: LayerChange,
    read: Tensor,
    inputs: Tensor,
) -> tuple[AttentionWeights, AttentionWeights, Tensor]:
    """The layer with its heads in order, the converted layer, and what the first gives on `read` [n,T,d]."""
    moments = second_moments(inputs)
    wide = change.regroup(config, layer.to(torch.float64), kv_heads, moments)
    layer, folded = (weights.to(torch.float32) for weights in (wide, change.fold(config, wide, kv_heads, moments)))
    probabilities, wanted = zip(*(attention.attend(layer, window) for window in read), strict=True)
    if change.correct and folded.kv_heads < layer.kv_heads:
        examples = Examples(inputs, list(probabilities), torch.stack(wanted))
        folded = refine(attention, layer, folded, read, examples)
    return layer, folded, torch.stack(wanted)


def _load_layer(config: ModelConfig, weights: Weights, index: int) -> Layer:
    """Norms and feed-forward of one layer, in float32; its attention is read apart."""
    with torch.device("meta"):
        block = Layer(config, config.kv_heads[index])
    del block.self_attn
    prefix = f"model.layers.{index}."
    block.load_state_dict({name: weights[prefix + name].read().float() for name in block.state_dict()}, assign=True)
    return block.eval()


def _inputs(config: ModelConfig, block: Layer, stream: Tensor) -> Tensor:
    """What the projections read of hidden states [n,T,d]: [n,T,e]."""
    normed = block.input_layernorm(stream)
    return torch.nn.functional.pad(normed, (0, 1), value=1.0) if config.qkv_bias else normed


def _finish(block: Layer, stream: Tensor) -> Tensor:
    """The feed-forward half of a layer, a window at a time."""
    return torch.stack([window + block.mlp(block.post_attention_layernorm(window)) for window in stream])
