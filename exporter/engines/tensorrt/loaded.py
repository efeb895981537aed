"""A plan on the GPU: checked, deserialised, given its weights; and calls of it over tensors that stay where they are.

Device memory, streams and graphs are torch's (see device.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.bundle import Bundle, Variant
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.api import Api, Messages, logger
from exporter.engines.tensorrt.parts import Part
from exporter.engines.tensorrt.record import EngineRecord
from exporter.engines.tensorrt.refit import refit
from exporter.errors import EngineError
from exporter.weights import TORCH_DTYPES

Times = list[dict[str, float]]  # of each call of a context, layer → milliseconds


class Loaded:
    """A deserialised plan and what it needs to live."""

    def __init__(self, api: Api, bundle: Bundle, folder: Path, engine: EngineRecord, part: Part) -> None:
        self.api, self.record, self.messages = api, engine, Messages()
        self.log = logger(api.trt, self.messages)
        self.runtime = api.trt.Runtime(self.log)
        if "version" in engine.recipe.compatible:  # such a plan brings the runtime of its own version along
            self.runtime.engine_host_code_allowed = True
        self.engine = self.runtime.deserialize_cuda_engine(read_plan(folder, engine))
        if self.engine is None:
            name = f"{api.trt.__name__} {api.version}"
            raise EngineError(f"{name} does not load {folder / engine.file}: {self.messages.reason()}")
        if engine.recipe.strip:
            refit(api, self.engine, self.log, self.messages, bundle, part, engine.recipe)
        for binding in part.outputs:
            found = self.engine.get_aliased_input_tensor(binding.name)
            if (found or None) != binding.alias:
                raise EngineError(
                    f"the engine has {binding.name} share the memory of {found or 'nothing'}, planned {binding.alias}"
                )

    def context(self, profile: int, stream: torch.cuda.Stream, times: Times | None, graph: bool = False) -> Any:
        """An execution context in an optimisation profile. With `times` its layers' go into the last of them, which a call
        begins; `graph` says that it is for calls which are all alike: TensorRT for RTX then captures them itself, but not
        while it is profiled."""
        trt = self.api.trt
        if self.api.rtx and graph and times is None:
            # It compiles kernels for the shapes it meets; only its own capture knows when those are ready.
            config = self.engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise EngineError(f"no execution context for {self.record.file}: {self.messages.reason()}")
        if not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise EngineError(f"{self.record.file} has no profile {profile}: {self.messages.reason()}")
        if times is not None:
            context.profiler = _profiler(trt, times)
        return context

    def nodes(self) -> dict[str, str]:
        """For each layer the nodes of the graph that it was made of, as the engine tells; nothing where it does not."""
        inspector = self.engine.create_engine_inspector()
        if inspector is None:
            return {}
        try:
            told = json.loads(inspector.get_engine_information(self.api.trt.LayerInformationFormat.JSON))
            return {str(layer["Name"]): str(layer.get("Metadata", "")) for layer in told["Layers"]}
        except (ValueError, KeyError, TypeError):  # built without DETAILED, names alone
            return {}

    def caches(self) -> dict[tuple[str, str], torch.Tensor]:
        """Zeros for each pair of a cache's input and the output that is the same memory."""
        aliased = [binding for binding in self.record.bindings if binding.alias is not None]
        return {(str(b.alias), b.name): zeros(b.shape, TORCH_DTYPES[b.dtype]) for b in aliased}


def bind_caches(context: Any, caches: dict[tuple[str, str], torch.Tensor]) -> None:
    for (past, present), cache in caches.items():
        context.set_tensor_address(past, cache.data_ptr())
        context.set_tensor_address(present, cache.data_ptr())


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On the GPU."""
    return torch.zeros(shape, dtype=dtype, device="cuda")


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On the host, for copies that nobody waits for."""
    return torch.zeros(shape, dtype=dtype, pin_memory=True)


def read_plan(folder: Path, engine: EngineRecord) -> bytes:
    """The plan, checked against what was built. Raises EngineError for one that is missing, cut or changed."""
    path = folder / engine.file
    if (flaw := engine.flaw(folder)) is not None:
        raise EngineError(f"{flaw}; build it again")
    if (found := record.sha256(path)) != engine.sha256:
        raise EngineError(
            f"{path} has the SHA-256 {found[:12]}…, {engine.sha256[:12]}… was built; it is damaged, build it again"
        )
    return path.read_bytes()


class Call:
    """Tokens, positions and logits of one call of T tokens a sequence, bound to a context."""

    def __init__(self, loaded: Loaded, context: Any, variant: Variant, T: int) -> None:
        self.loaded, self.context = loaded, context
        shape, rows = (loaded.record.recipe.batch, T), T if variant.logits == "all" else 1
        self.host_ids, self.host_positions = (pinned(shape, torch.int64) for _ in range(2))
        self.ids, self.positions = (zeros(shape, torch.int64) for _ in range(2))
        self.logits = zeros((shape[0], rows, variant.config.vocab_size), TORCH_DTYPES[variant.dtype])
        self.host_logits = pinned(tuple(self.logits.shape), torch.float32)
        for name, tensor in (("input_ids", self.ids), ("position_ids", self.positions)):
            if not context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT takes no {name} of {list(shape)}: {loaded.messages.reason()}")
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_tensor_address("logits", self.logits.data_ptr())

    def run(self, stream: torch.cuda.Stream) -> np.ndarray:
        """With what `host_ids` and `host_positions` hold; float32 logits [B, T or 1, V]. Raises EngineError."""
        with torch.cuda.stream(stream):
            if not self.enqueue(stream):
                raise EngineError(f"TensorRT failed in a step: {self.loaded.messages.reason()}")
        stream.synchronize()
        return self.host_logits.numpy()

    def enqueue(self, stream: torch.cuda.Stream) -> bool:
        """Copy in, run, copy out, all on `stream`."""
        self.ids.copy_(self.host_ids, non_blocking=True)
        self.positions.copy_(self.host_positions, non_blocking=True)
        done = self.context.execute_async_v3(stream.cuda_stream)
        self.host_logits.copy_(self.logits, non_blocking=True)  # to float32 on the way
        return bool(done)


class Step(Call):
    """One token a sequence, as a CUDA graph from the second time on; without one where layers are timed."""

    def __init__(self, loaded: Loaded, context: Any, variant: Variant, times: Times | None) -> None:
        super().__init__(loaded, context, variant, 1)
        self._times, self._captures = times, times is None and not loaded.api.rtx
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, stream: torch.cuda.Stream) -> np.ndarray:
        if self._graph is not None:
            with torch.cuda.stream(stream):
                self._graph.replay()
            stream.synchronize()
            return self.host_logits.numpy()
        if self._times is not None:
            self._times.append({})
        logits = super().run(stream)
        if self._captures:  # after a first step: by then the engine has allocated what it needs
            self._graph = self._captured(stream)
            self._captures = self._graph is not None
        return logits

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        """None of an engine that cannot be captured: it is run call by call."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                done = self.enqueue(stream)
        except RuntimeError:  # what was enqueued has ended the capture
            return None
        return graph if done else None

    def forget(self) -> None:
        """Shapes have changed: what was captured holds no longer."""
        self._graph = None


def write_times(prefix: Path, times: Times, nodes: dict[str, str]) -> Path:
    """Layer times of each call, and what the layers were made of, as JSON beside `prefix`."""
    path = prefix.with_name(prefix.name + ".layers.json")
    path.write_text(json.dumps({"calls": times, "nodes": nodes}, indent=1, ensure_ascii=False), "utf-8")
    return path


def _profiler(trt: Any, times: Times) -> Any:
    class Layers(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            times[-1][name] = times[-1].get(name, 0.0) + milliseconds

    return Layers()
