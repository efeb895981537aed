"""Hidden states through a model, one layer's weights in memory at a time: what a conversion measures itself on.

Streams are hidden states [n,T,d] of n windows of T tokens, in float32 and changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.checkpoint.expected import EMBEDDING, HEAD, POSITIONS
from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.causal import CausalAttention
from exporter.models.decoder import Layer
from exporter.models.ffn import FeedForward
from exporter.models.norm import Norm
from exporter.weights import FileTensor, LazyTensor, Weights


class Walk:
    """The layers of a checkpoint on windows of `length` tokens. Every method reads the weights it needs and lets them go."""

    def __init__(self, config: ModelConfig, weights: Weights, length: int) -> None:
        self.config, self.weights = config, weights
        self.attention = CausalAttention(config, length)

    def embed(self, windows: Tensor) -> Tensor:
        """int64 [n,T] → stream [n,T,d]."""
        stream = _rows(self.weights[EMBEDDING], windows).float() * self.config.embed_scale
        if self.config.learned_positions:
            stream += self._read(POSITIONS)[: windows.shape[1]]
        return stream

    def layer(self, index: int) -> AttentionWeights:
        return AttentionWeights.read(self.config, self.weights, index, torch.float32)

    def whole(self, index: int) -> nn.Module:
        """A layer as the model of exporter/models has it."""
        with torch.device("meta"):
            empty = Layer(self.config, self.config.kv_heads[index])
        return self._load(empty, f"model.layers.{index}.")

    def inputs(self, index: int, stream: Tensor) -> Tensor:
        """What the projections of a layer read: [n,T,e]."""
        norm = self._load(Norm(self.config, self.config.hidden_size), f"model.layers.{index}.input_layernorm.")
        normed = torch.stack([norm(window) for window in stream])
        return F.pad(normed, (0, 1), value=1.0) if self.config.qkv_bias else normed

    def advance(self, index: int, streams: Sequence[Tensor], attended: Sequence[Tensor]) -> None:
        """Each stream past layer `index`, whose attention gave `attended`: residual connections and feed-forward."""
        prefix, d = f"model.layers.{index}.", self.config.hidden_size
        bias = self._read(f"{prefix}self_attn.o_proj.bias") if self.config.o_bias else 0.0
        norm = self._load(Norm(self.config, d), f"{prefix}post_attention_layernorm.")
        with torch.device("meta"):
            empty = FeedForward(self.config)
        feed_forward = self._load(empty, f"{prefix}mlp.")
        for stream, output in zip(streams, attended, strict=True):
            for window, found in zip(stream, output, strict=True):
                window += found + bias
                window += feed_forward(norm(window))

    def head(self) -> tuple[nn.Module, Tensor]:
        """The last norm, and the output head [V,d] in the checkpoint's dtype."""
        norm = self._load(Norm(self.config, self.config.hidden_size), "model.norm.")
        return norm, self.weights[EMBEDDING if self.config.tied else HEAD].read()

    def _read(self, name: str) -> Tensor:
        return self.weights[name].read().float()

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        module.load_state_dict({name: self._read(prefix + name) for name in module.state_dict()}, assign=True)
        return module.eval().requires_grad_(False)


def _rows(tensor: LazyTensor, index: Tensor) -> Tensor:
    """Rows of a matrix by number; of a file only those that are asked for."""
    if not isinstance(tensor, FileTensor):
        return tensor.read()[index]
    numbers, places = index.unique(return_inverse=True)
    rows = [tensor.rows(number, number + 1, tensor.name).read()[0] for number in numbers.tolist()]
    return torch.stack(rows)[places]
