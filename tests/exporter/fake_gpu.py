"""A GPU that is not there: engines whose plans are ONNX graphs, run by ONNX Runtime on memory of the host.

What TensorRT is given, parses and verifies is real; a "plan" is that very graph with its weights. A context of it knows its
inputs by address and shape only, and takes none outside the profiles, so a session over it does all that it does on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from exporter.bundle import Bundle
from exporter.engines.tensorrt import build as stage
from exporter.engines.tensorrt import session as sessions
from exporter.engines.tensorrt.api import Api, load
from exporter.engines.tensorrt.build import Built, build
from exporter.engines.tensorrt.loaded import Call
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.engines.tensorrt.weights import Source

LAYERS = {"_gemm_myl0_1": 1e-3, "_gemm_mha_myl0_2": 2e-3, "__myl_AddMean_myl0_3": 0.25e-3}  # milliseconds of each call
NODES = {
    "_gemm_myl0_1": "[ONNX Layer: /model/layers.0/self_attn/q_proj/Gemm]",
    "_gemm_mha_myl0_2": "[ONNX Layer: /model/layers.0/self_attn/Attention]\x1e[ONNX Layer: /model/layers.0/self_attn/Reshape]",
}
ELEMENTS = {"tensor(int64)": np.dtype(np.int64), "tensor(float)": np.dtype(np.float32)}


def build_fakes(bundle: Bundle, options: BuildOptions) -> list[Built]:
    """`headpool build`, but for the builder's own run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "compile_plan", _compile)
        return build(bundle, options)


def _compile(_parsed: Any, _config: Any, source: Source, path: Path, _on_progress: Any) -> tuple[int, str]:
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    for tensor in model.graph.initializer:
        if tensor.name in source.arrays:
            tensor.raw_data = source.arrays[tensor.name].tobytes()
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith("TRT_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    data = model.SerializeToString()
    path.write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


class Context:
    """An execution context. `ran` counts the calls of all contexts of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.places, self.shapes = engine, dict[str, int](), dict[str, tuple[int, ...]]()
        self.profiler: Any = None

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.profile = profile
        return True

    def set_tensor_address(self, name: str, place: int) -> None:
        self.places[name] = place

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = next(value.shape for value in self.engine.runtime.get_inputs() if value.name == name)
        fits = len(wanted) == len(shape) and all(w == s or isinstance(w, str) for w, s in zip(wanted, shape, strict=True))
        opened = [s for w, s in zip(wanted, shape, strict=True) if isinstance(w, str)]
        if not fits or any(not 1 <= size <= self.engine.most[self.profile] for size in opened):
            return False
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        self.engine.ran += 1
        feeds = {}
        for value in self.engine.runtime.get_inputs():
            opened = any(isinstance(size, str) for size in value.shape)
            shape = self.shapes[value.name] if opened else value.shape
            feeds[value.name] = _memory(self.places[value.name], shape, ELEMENTS[value.type]).copy()
        outputs = self.engine.runtime.get_outputs()
        for value, made in zip(outputs, self.engine.runtime.run(None, feeds), strict=True):
            _memory(self.places[value.name], made.shape, made.dtype)[...] = made
        if self.profiler is not None:
            for name, milliseconds in LAYERS.items():
                self.profiler.report_layer_time(name, milliseconds)
        return True


def _memory(place: int, shape: Any, dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(place), dtype).reshape(shape)


class Engine:
    def __init__(self, plan: bytes, most: tuple[int, ...]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.runtime = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.most, self.ran = most, 0

    def create_execution_context(self, _config: Any = None) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Any:
        layers = [{"Name": name, "Metadata": NODES.get(name, "")} for name in LAYERS]
        return SimpleNamespace(get_engine_information=lambda _form: json.dumps({"Layers": layers}))

    def create_runtime_config(self) -> Any:
        return SimpleNamespace()

    def get_aliased_input_tensor(self, name: str) -> str:
        past = name.replace("present", "past_key_values")
        return past if past != name and past in {value.name for value in self.runtime.get_inputs()} else ""


class Graph:
    """A captured CUDA graph: calls that are made again."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


def install(patch: pytest.MonkeyPatch, most: tuple[int, ...], captures: bool) -> list[Engine]:
    """Pretend that there is an sm89; the engines that sessions load from now on. `most` is the longest of each profile.

    `captures`: sessions capture CUDA graphs themselves, as over full TensorRT; what a graph does not capture is not replayed.
    """
    engines: list[Engine] = []
    real, zeros = load("tensorrt-rtx"), torch.zeros

    class Runtime:
        def __init__(self, _log: Any) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Engine:
            engines.append(Engine(plan, most))
            return engines[-1]

    class FakeApi(Api):
        @property
        def rtx(self) -> bool:
            return not captures

    names = {name: getattr(real.trt, name) for name in ("ILogger", "IProfiler", "CudaGraphStrategy", "LayerInformationFormat")}
    api = FakeApi("tensorrt-rtx", SimpleNamespace(Runtime=Runtime, **names), real.version)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    recording: list[Graph] = []
    enqueue = Call.enqueue

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Any) -> Iterator[None]:
        recording.append(graph)
        yield
        recording.pop()

    def enqueued(call: Call, on: Any) -> bool:
        if recording:
            shapes = dict(call.context.shapes)

            def again() -> None:
                assert call.context.shapes == shapes, "a captured graph was replayed with other shapes"
                enqueue(call, on)

            recording[-1].calls.append(again)
            return True
        return enqueue(call, on)

    patch.setattr(sessions, "load", lambda _backend: api)
    patch.setattr(Call, "enqueue", enqueued)
    patch.setattr(torch, "zeros", lambda *args, device=None, pin_memory=False, **given: zeros(*args, **given))
    for name, value in {
        "is_available": lambda: True,
        "get_device_capability": lambda: (8, 9),
        "get_device_name": lambda: "a GPU that is not there",
        "Stream": lambda: stream,
        "stream": lambda _stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        patch.setattr(f"torch.cuda.{name}", value)
    return engines
