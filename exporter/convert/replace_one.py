"""What each layer loses by fewer KV heads: one layer replaced at a time, KL(original ‖ replaced) of the next token.

The scores of Puzzle (Bercovich et al. 2024, arXiv 2411.19146, section 4). A layer's weights are in memory at a time, so a
model of any size is measured; the work is layers² / 2 of a forward pass for each number of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights
from exporter.convert.calibrate import convert_layer
from exporter.convert.layer import check_finite, solvable
from exporter.convert.methods import Grouping, Method, convert_weights, layer_change
from exporter.convert.walk import Walk
from exporter.errors import UserError
from exporter.weights import Weights

Progress = Callable[[str, int, int], None]  # what, done, total
MEASURED = 2  # windows, the last ones, that nothing is converted on
TOKENS_AT_ONCE = 128  # whose logits are in memory


class ReplaceOne:
    """`windows` int64 [n,T]: layers are converted on all but the last MEASURED, and measured on those.

    `on_tokens` says whether the method reads tokens; those that do not are measured on the same windows.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        windows: np.ndarray,
        method: Method,
        seed: int,
        grouping: Grouping,
        on_tokens: bool,
        progress: Progress,
    ) -> None:
        if len(windows) <= MEASURED:
            raise UserError(
                f"the calibration text fills {len(windows)} of the {MEASURED + 1} windows of {windows.shape[1]} tokens that "
                "are needed; choose a longer text, or self"
            )
        self.config, self.weights, self.progress = config, weights, progress
        self.method, self.seed, self.grouping = method, seed, grouping
        self.windows = torch.from_numpy(windows)
        self.tokens = windows[:-MEASURED] if on_tokens else None

    @torch.no_grad()
    def losses(self, counts: Sequence[Sequence[int]], done: Collection[int]) -> Iterator[tuple[int, dict[int, float]]]:
        """(layer, nats a token by KV heads) for every layer that is not `done`, as it is measured. `counts`: what to try."""
        config, layers = self.config, self.config.num_layers
        walk = Walk(config, self.weights, self.windows.shape[1])
        attend, stream = walk.attention.attend, walk.embed(self.windows)
        reference = self._through(walk, stream[-MEASURED:].clone(), "reading the original")
        for index in range(layers):
            self.progress("replacing layers", index, layers)
            read, layer = walk.inputs(index, stream), walk.layer(index)
            tried = [] if index in done else counts[index]
            given = [attend(self._converted(walk, layer, index, count, read), read[-MEASURED:]) for count in tried]
            streams = [stream[-MEASURED:].clone() for _ in tried]
            attended = attend(layer, read)
            del read, layer
            walk.advance(index, (stream, *streams), (attended, *given))
            del attended, given
            if index in done:
                continue
            for later in range(index + 1, layers):
                layer = walk.layer(later)
                walk.advance(later, streams, [attend(layer, walk.inputs(later, replaced)) for replaced in streams])
            found = dict(zip(tried, divergences(walk, reference, streams), strict=True))
            for count, loss in found.items():
                if not np.isfinite(loss):
                    raise UserError(
                        f"layer {index} with {count} KV heads gives logits that are no numbers; its weights are damaged or "
                        "too large: see 'headpool eval'"
                    )
            yield index, found
        self.progress("replacing layers", layers, layers)

    @torch.no_grad()
    def loss_of(self, kv_heads: tuple[int, ...]) -> float:
        """Nats a token of all layers replaced at once, converted as `convert` does it."""
        target, weights = convert_weights(
            self.config,
            self.weights,
            kv_heads,
            self.method,
            self.seed,
            grouping=self.grouping,
            tokens=self.tokens,
            progress=self.progress,
        )
        ends = []
        for config, tensors in ((self.config, self.weights), (target, weights)):
            walk = Walk(config, tensors, self.windows.shape[1])
            ends.append(self._through(walk, walk.embed(self.windows[-MEASURED:]), "measuring the plan"))
        return divergences(walk, ends[0], ends[1:])[0]

    def _converted(self, walk: Walk, layer: AttentionWeights, index: int, count: int, read: Tensor) -> AttentionWeights:
        """Layer `index`, whose windows read `read` [n,T,e], with `count` KV heads."""
        if self.tokens is not None:
            change, fitted = layer_change(self.method, self.grouping, self.seed), read[:-MEASURED]
            with solvable(index):
                folded, *_ = convert_layer(walk.attention, self.config, layer, count, change, fitted, fitted)
                check_finite(folded)
            return folded
        kv_heads = (*self.config.kv_heads[:index], count, *self.config.kv_heads[index + 1 :])
        target, weights = convert_weights(self.config, self.weights, kv_heads, self.method, self.seed, grouping=self.grouping)
        return AttentionWeights.read(target, weights, index, torch.float32)

    def _through(self, walk: Walk, stream: Tensor, what: str) -> Tensor:
        layers = walk.config.num_layers
        for index in range(layers):
            self.progress(what, index, layers)
            walk.advance(index, [stream], [walk.attention.attend(walk.layer(index), walk.inputs(index, stream))])
        self.progress(what, layers, layers)
        return stream


def divergences(walk: Walk, original: Tensor, others: Sequence[Tensor]) -> list[float]:
    """KL(original ‖ other) of the next token in nats, the mean over tokens; hidden states [n,T,d] after the last layer."""
    norm, head = walk.head()
    blocks = head.split(16384)  # of a large vocabulary cast to float32 one at a time

    def logits(states: Tensor) -> Tensor:
        return torch.cat([states @ rows.float().T for rows in blocks], dim=1).log_softmax(-1)

    totals = np.zeros(len(others))
    streams = [norm(states).flatten(0, 1) for states in (original, *others)]
    for parts in zip(*(states.split(TOKENS_AT_ONCE) for states in streams), strict=True):
        wanted = logits(parts[0])
        weight = wanted.exp()
        totals += [float((weight * (wanted - logits(part))).sum(-1).double().sum()) for part in parts[1:]]
    return (totals / len(streams[0])).tolist()
