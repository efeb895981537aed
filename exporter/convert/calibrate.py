"""Conversion on tokens: layer by layer, each one measured on what the layers converted before it make of them.

Two streams of hidden states run through the model, the original's and the converted one's, a layer's weights in memory at a
time: 2 · tokens · d floats, and of one layer the attention probabilities, windows · H · T² floats, and what the fit works on
(least_squares.py), some times tokens · H · D floats. Converted layers wait on disk until they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.causal import CausalAttention
from exporter.convert.layer import LayerChange, check_finite, solvable
from exporter.convert.least_squares import Tokens
from exporter.convert.refine import ROUNDS, Examples, refine_output, refine_scores, ridge_inverse, second_moments
from exporter.convert.scratch import Scratch
from exporter.convert.walk import Walk
from exporter.memory import give_memory_back
from exporter.weights import LazyTensor, Weights

Progress = Callable[[str, int, int], None]  # what, done, total


@torch.no_grad()
def convert_on_tokens(
    config: ModelConfig, weights: Weights, target: ModelConfig, change: LayerChange, tokens: np.ndarray, progress: Progress
) -> dict[str, LazyTensor]:
    """The tensors that differ, by canonical name, in the dtypes of `weights`. tokens is int64 [n,T]: n windows.

    Raises CheckpointError, with the number of the layer, where weights are so large that no solution is finite.
    """
    windows = torch.from_numpy(tokens)
    walk, scratch = Walk(config, weights, windows.shape[1]), Scratch()
    original = walk.embed(windows)
    converted = original.clone()
    changed: dict[str, LazyTensor] = {}
    for index, (before, after) in enumerate(zip(config.kv_heads, target.kv_heads, strict=True)):
        progress("converting layers", index, config.num_layers)
        inputs = walk.inputs(index, converted)
        if change.keeps(before, after):
            layer = walk.layer(index)
            wanted, given = (walk.attention.attend(layer, stream) for stream in (walk.inputs(index, original), inputs))
        else:
            with solvable(index):
                folded, wanted, probabilities = convert_layer(
                    walk.attention, config, walk.layer(index), after, change, walk.inputs(index, original), inputs
                )
                given = walk.attention.outputs(folded, probabilities, inputs)
                check_finite(folded, wanted, given)
            for name, tensor in folded.tensors(config, index).items():
                changed[name] = scratch.keep(name, tensor.to(weights[name].dtype))
            del folded, probabilities
        del inputs
        walk.advance(index, (original, converted), (wanted, given))
    progress("converting layers", config.num_layers, config.num_layers)
    return changed


def convert_layer(
    attention: CausalAttention,
    config: ModelConfig,
    layer: AttentionWeights,
    kv_heads: int,
    change: LayerChange,
    read: Tensor,
    inputs: Tensor,
) -> tuple[AttentionWeights, Tensor, Iterable[Tensor]]:
    """`layer` with `kv_heads` KV heads; what `layer` gives on `read` [n,T,e]; that one's probabilities on `inputs` [n,T,e].

    It lets go of `layer` and `read`, which nobody else should hold.
    """
    moments = second_moments(inputs)
    wide = change.regroup(config, layer.to(torch.float64), kv_heads, moments)
    del layer  # of a large model each of these is hundreds of megabytes
    folded = change.fold(config, wide, kv_heads, moments).to(torch.float32)
    layer = wide.to(torch.float32)
    del wide, moments
    if not change.correct or change.keeps(layer.kv_heads, folded.kv_heads):
        return folded, attention.attend(layer, read), (attention.attention(folded, window) for window in inputs)
    fewer = folded.kv_heads < layer.kv_heads
    scored = [attention.scored(layer, window) for window in read]
    probabilities = [attention.probabilities(attention.scores(*pair)) for pair in scored]
    wanted = attention.outputs(layer, probabilities, read)
    del layer, read
    tokens = Tokens(inputs, ridge_inverse(second_moments(inputs)).to(inputs.dtype))
    examples = Examples(tokens, scored, probabilities, wanted)
    give_memory_back()
    refine_scores(attention, folded, examples, ROUNDS if fewer else 0)
    scored.clear()
    give_memory_back()
    refine_output(attention, folded, examples)
    return folded, wanted, examples.probabilities
