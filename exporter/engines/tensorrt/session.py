"""A TensorRT engine as a session: caches on the GPU written in place, decoding as one CUDA graph.

Device memory, the stream and the graph are torch's (see device.py). Each optimisation profile has an execution context of its
own; both work on the same caches. A decode step copies B tokens and positions to the GPU, replays, and copies B·V logits back:
the only synchronisation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.bundle import Bundle, Variant
from exporter.engines.base import Session, SessionInfo, check_score
from exporter.engines.feeding import Feed, right_padded
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.api import Api, Messages, load, logger
from exporter.engines.tensorrt.device import check_device, compute_capability
from exporter.engines.tensorrt.record import EngineRecord
from exporter.engines.tensorrt.refit import refit
from exporter.errors import EngineError
from exporter.weights import TORCH_DTYPES

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
    quantize: str | None = None,
) -> Session:
    """`capacity` is at most the engine's; `quantize` None prefers plain weights. `threads` are of no use here.

    With `profile_to`, the times of the engine's layers are summed over all calls and `close()` writes them; decoding then does
    without its CUDA graph. Raises EngineError.
    """
    api = load(backend)
    wanted = record.Wanted(backend, api.version, batch, capacity, quantize)
    record.choose(bundle, variant, wanted)  # what is not there needs no GPU to know
    check_device()
    device = compute_capability()
    folder, engine = record.choose(bundle, variant, wanted, device)
    runtime = _Engine(api, folder, engine)
    if engine.recipe.strip:
        refit(api, runtime.engine, runtime.log, runtime.messages, bundle, variant, engine.recipe)
    runtime.check_aliases(variant)
    options = {"capacity": engine.recipe.capacity, "prefill": engine.recipe.prefill, "quantize": engine.recipe.quantize}
    provider = f"{torch.cuda.get_device_name()} ({device})"
    versions = {engine.recipe.module: api.version, "torch": torch.__version__}
    info = SessionInfo(backend, provider, versions, options)
    try:
        return TensorRTSession(runtime, variant, engine, capacity, info, None if profile_to is None else Path(profile_to))
    except torch.cuda.OutOfMemoryError as error:
        size = variant.kv_bytes_per_token * batch * engine.recipe.capacity
        reason = str(error).splitlines()[0]
        raise EngineError(f"no GPU memory for caches of {size / 1e6:.0f} MB: {reason}; build for less --capacity") from None


class _Engine:
    """A deserialised plan and what it needs to live."""

    def __init__(self, api: Api, folder: Path, engine: EngineRecord) -> None:
        self.messages = Messages()
        self.log = logger(api.trt, self.messages)
        self.api = api
        self.runtime = api.trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(read_plan(folder, engine))
        if self.engine is None:
            name = f"{api.trt.__name__} {api.version}"
            raise EngineError(f"{name} does not load {folder / engine.file}: {self.messages.reason()}")

    def check_aliases(self, variant: Variant) -> None:
        for binding in variant.outputs():
            found = self.engine.get_aliased_input_tensor(binding.name)
            if (found or None) != binding.alias:
                raise EngineError(
                    f"the engine has {binding.name} share the memory of {found or 'nothing'}, planned {binding.alias}"
                )


def read_plan(folder: Path, engine: EngineRecord) -> bytes:
    """The plan, checked against what was built. Raises EngineError for one that is missing, cut or changed."""
    path = folder / engine.file
    if not path.is_file():
        raise EngineError(f"{path} is missing, engine.json names it; build it again")
    if path.stat().st_size != engine.bytes:
        raise EngineError(f"{path} has {path.stat().st_size} bytes, {engine.bytes} were built; it is damaged, build it again")
    if (found := record.sha256(path)) != engine.sha256:
        raise EngineError(
            f"{path} has the SHA-256 {found[:12]}…, {engine.sha256[:12]}… was built; it is damaged, build it again"
        )
    return path.read_bytes()


class _Call:
    """Tokens, positions and logits of one call of T tokens, bound to a context."""

    def __init__(self, session: TensorRTSession, context: Any, T: int) -> None:
        self.context = context
        shape, rows = (session.batch, T), T if session.variant.logits == "all" else 1
        dtype = TORCH_DTYPES[session.variant.dtype]
        self.host_ids, self.host_positions = (torch.zeros(shape, dtype=torch.int64, pin_memory=True) for _ in range(2))
        self.ids, self.positions = (torch.zeros(shape, dtype=torch.int64, device="cuda") for _ in range(2))
        self.logits = torch.zeros((session.batch, rows, session.config.vocab_size), dtype=dtype, device="cuda")
        self.host_logits = torch.zeros(self.logits.shape, dtype=torch.float32, pin_memory=True)
        for name, tensor in (("input_ids", self.ids), ("position_ids", self.positions)):
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_tensor_address("logits", self.logits.data_ptr())

    def enqueue(self, stream: torch.cuda.Stream) -> bool:
        """Copy in, run, copy out, all on `stream`."""
        self.ids.copy_(self.host_ids, non_blocking=True)
        self.positions.copy_(self.host_positions, non_blocking=True)
        done = self.context.execute_async_v3(stream.cuda_stream)
        self.host_logits.copy_(self.logits, non_blocking=True)  # to float32 on the way
        return bool(done)


class TensorRTSession(Session):
    """B sequences over caches [B, G, S, D] of the engine's capacity S."""

    def __init__(
        self,
        runtime: _Engine,
        variant: Variant,
        engine: EngineRecord,
        capacity: int,
        info: SessionInfo,
        profile_to: Path | None,
    ) -> None:
        super().__init__(variant.config, engine.recipe.batch, capacity, info)
        self.variant, self.chunk, self.runtime = variant, engine.recipe.prefill, runtime
        self.stream = torch.cuda.Stream()
        self.profile: Path | None = None  # where layer times were written, after close()
        self._profile_to = profile_to
        self._times: dict[str, float] = {}  # layer → milliseconds
        shapes = {b.name: b.shape for b in engine.bindings}
        dtype = TORCH_DTYPES[variant.dtype]
        with torch.cuda.stream(self.stream):
            self._caches = {
                (b.alias, b.name): torch.zeros(shapes[b.name], dtype=dtype, device="cuda")
                for b in variant.outputs()
                if b.alias is not None
            }
            self._contexts = [self._context(index) for index in (PREFILL, DECODE)]
            self._step = _Call(self, self._contexts[DECODE], 1)
        self._graph: torch.cuda.CUDAGraph | None = None
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
        if self._graph is not None:
            with torch.cuda.stream(self.stream):
                self._graph.replay()
        else:
            self._run(self._step)
        self.stream.synchronize()
        self.lengths += 1
        if self._graph is None and self._profile_to is None and not self.runtime.api.rtx:
            self._graph = self._capture()  # after a first step: by then the engine has allocated what it needs
        return self._step.host_logits.numpy()[:, 0]

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
        if self._profile_to is not None and self.profile is None:
            path = self._profile_to.with_name(self._profile_to.name + ".layers.json")
            layers = [{"name": name, "milliseconds": time} for name, time in self._times.items()]
            path.write_text(json.dumps({"layers": layers}, indent=1, ensure_ascii=False), "utf-8")
            self.profile = path
        self._graph = None
        self._contexts.clear()
        self._caches.clear()
        del self._step

    def _context(self, profile: int) -> Any:
        trt, engine = self.runtime.api.trt, self.runtime.engine
        if self.runtime.api.rtx and profile == DECODE and self._profile_to is None:
            # It compiles kernels for the shapes it meets; only its own capture knows when those are ready.
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            size = sum(cache.nbytes for cache in self._caches.values())
            raise EngineError(f"no execution context (caches take {size / 1e6:.0f} MB): {self.runtime.messages.reason()}")
        context.set_optimization_profile_async(profile, self.stream.cuda_stream)
        for (past, present), cache in self._caches.items():
            context.set_tensor_address(past, cache.data_ptr())
            context.set_tensor_address(present, cache.data_ptr())
        if self._profile_to is not None:
            context.profiler = _profiler(trt, self._times)
        return context

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step.enqueue(self.stream)
        return graph

    def _feed(self, feed: Feed) -> np.ndarray:
        """One call of a prefill: float32 logits [B, T or 1, V]."""
        with torch.cuda.stream(self.stream):
            call = self._step if feed.ids.shape[1] == 1 else _Call(self, self._contexts[PREFILL], feed.ids.shape[1])
        call.host_ids.copy_(torch.from_numpy(feed.ids))
        call.host_positions.copy_(torch.from_numpy(feed.positions))
        self._run(call)
        self.stream.synchronize()
        self.lengths += feed.counts
        return call.host_logits.numpy()

    def _run(self, call: _Call) -> None:
        with torch.cuda.stream(self.stream):
            if not call.enqueue(self.stream):
                raise EngineError(f"TensorRT failed in a step: {self.runtime.messages.reason()}")

    def _kv_token_bytes(self) -> int:
        return self.variant.kv_bytes_per_token


def _profiler(trt: Any, times: dict[str, float]) -> Any:
    class Layers(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            times[name] = times.get(name, 0.0) + milliseconds

    return Layers()
