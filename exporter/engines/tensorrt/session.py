"""A TensorRT engine as a session: caches on the GPU written in place, decoding as one CUDA graph.

Each optimisation profile has an execution context of its own; both work on the same caches. A decode step copies B tokens and
positions to the GPU, replays, and copies B·V logits back: the only synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from exporter.bundle import Bundle, Seq2SeqVariant, Variant
from exporter.engines.base import Session, SessionInfo, check_score
from exporter.engines.feeding import Feed, right_padded
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.api import load
from exporter.engines.tensorrt.device import check_device, compute_capability
from exporter.engines.tensorrt.loaded import Call, Loaded, Step, Times, bind_caches, write_times
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.seq2seq_session import TensorRTSeq2SeqSession
from exporter.errors import EngineError

PREFILL, DECODE = 0, 1  # the profiles, in the order they were built


def open_session(
    bundle: Bundle,
    variant: Variant,
    *,
    batch: int,
    capacity: int,
    threads: int | None = None,
    profile_to: str | Path | None = None,
    backend: str = "tensorrt-rtx",
    engine_weights: str | None = None,
) -> Session:
    """`capacity` is at most the engine's; `engine_weights` None prefers plain ones. `threads` are of no use here.

    With `profile_to`, `close()` writes the times of the engine's layers (of an encoder-decoder the decoder's) in each decode
    step; decoding then does without its CUDA graph. Raises EngineError.
    """
    api = load(backend)
    wanted = record.Wanted(backend, api.version, batch, capacity, engine_weights)
    record.choose(bundle, variant, wanted)  # what is not there needs no GPU to know
    check_device()
    device = compute_capability()
    folder, engine = record.choose(bundle, variant, wanted, device)
    engines = [record.encoder_of(bundle, folder, engine), engine] if isinstance(variant, Seq2SeqVariant) else [engine]
    options = {"capacity": engine.recipe.capacity, "prefill": engine.recipe.prefill, "quantize": engine.recipe.quantize}
    provider = f"{torch.cuda.get_device_name()} ({device})"
    info = SessionInfo(backend, provider, {engine.recipe.module: api.version, "torch": torch.__version__}, options)
    loaded = [Loaded(api, bundle, folder, one, part) for one, part in zip(engines, parts_of(variant), strict=True)]
    times = None if profile_to is None else Path(profile_to)
    try:
        if isinstance(variant, Seq2SeqVariant):
            return TensorRTSeq2SeqSession(loaded[0], loaded[1], variant, capacity, info, times)
        return TensorRTSession(loaded[0], variant, capacity, info, times)
    except torch.cuda.OutOfMemoryError as error:
        size = variant.kv_bytes_per_token * batch * engine.recipe.capacity
        reason = str(error).splitlines()[0]
        raise EngineError(f"no GPU memory for caches of {size / 1e6:.0f} MB: {reason}; build for less --capacity") from None


class TensorRTSession(Session):
    """B sequences over caches [B, G, S, D] of the engine's capacity S."""

    def __init__(
        self, loaded: Loaded, variant: Variant, capacity: int, info: SessionInfo, profile_to: Path | None = None
    ) -> None:
        recipe = loaded.record.recipe
        super().__init__(variant.config, recipe.batch, capacity, info)
        self.variant, self.chunk, self.runtime = variant, recipe.prefill, loaded
        self.stream = torch.cuda.Stream()
        self.profile: Path | None = None  # where layer times were written, after close()
        self._profile_to = profile_to
        self._times: Times | None = None if profile_to is None else []
        with torch.cuda.stream(self.stream):
            self._caches = loaded.caches()
            self._contexts = [
                loaded.context(PREFILL, self.stream, None),
                loaded.context(DECODE, self.stream, self._times, graph=True),
            ]
            for context in self._contexts:
                bind_caches(context, self._caches)
            self._step = Step(loaded, self._contexts[DECODE], variant, self._times)
        self.stream.synchronize()

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        for feed in right_padded(prompts, self.lengths, self.capacity, self.chunk):
            logits = self._feed(feed)
        return logits[:, -1]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        self._step.host_ids.numpy()[:, 0] = tokens
        self._step.host_positions.numpy()[:, 0] = self.lengths
        logits = self._step.run(self.stream)
        self.lengths += 1
        return logits[:, 0]

    def score(self, tokens: np.ndarray, skip: int = 0) -> Iterator[np.ndarray]:
        if self.variant.logits != "all":
            yield from super().score(tokens, skip)
            return
        check_score(tokens, skip)
        self.check_prompts(list(tokens))
        seen = 0
        for feed in right_padded(list(tokens), self.lengths, self.capacity, self.chunk):
            logits = self._feed(feed)
            if seen + logits.shape[1] > skip:
                yield logits[:, max(skip - seen, 0) :]
            seen += logits.shape[1]

    def rewind(self, length: int) -> None:
        self.check_rewind(length)
        self.lengths[:] = length  # the rows after it are overwritten before they are seen

    def close(self) -> None:
        if not self._contexts:
            return
        self.stream.synchronize()
        if self._profile_to is not None and self._times is not None:
            self.profile = write_times(self._profile_to, self._times, self.runtime.nodes())
        del self._step
        self._contexts.clear()
        self._caches.clear()
        del self.runtime  # and with it the weights

    def _feed(self, feed: Feed) -> np.ndarray:
        """One call of a prefill: float32 logits [B, T or 1, V]."""
        T = feed.ids.shape[1]
        try:
            with torch.cuda.stream(self.stream):
                call = self._step if T == 1 else Call(self.runtime, self._contexts[PREFILL], self.variant, T)
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(f"no GPU memory for a call of {T} tokens: {str(error).splitlines()[0]}") from None
        call.host_ids.copy_(torch.from_numpy(feed.ids))
        call.host_positions.copy_(torch.from_numpy(feed.positions))
        logits = call.run(self.stream)
        self.lengths += feed.counts
        return logits

    def _kv_token_bytes(self) -> int:
        return self.variant.kv_bytes_per_token
