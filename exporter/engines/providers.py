"""ONNX Runtime's execution providers: how each is got, where sessions on it keep their caches, and what it is told of sizes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.config import CacheForm
from exporter.contract import Binding
from exporter.engines.tensorrt.parts import ENGINE_PATTERNS, is_engine_form
from exporter.errors import EngineError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"
# onnxruntime and onnxruntime-gpu fill the same folder, so only the one installed last is whole; as README's "Install" has it.
INSTALL_CUDA = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'onnxruntime-gpu>=1.31'"


@dataclass(frozen=True)
class Provider:
    """`backend` is headpool's word for it. `options` is the prefix of the provider's own options where it compiles engines,
    which hold for one batch and one capacity; `plugin` the module that brings it where ONNX Runtime is built without it;
    `links` the module that brings what it links, of version 10."""

    backend: str
    device: str
    install: str
    options: str = ""
    plugin: str = ""
    links: str = ""

    @property
    def compiles(self) -> bool:
        return bool(self.options)


PROVIDERS = {
    CPU: Provider("onnxruntime", "cpu", "pip install onnxruntime"),
    CUDA: Provider("onnxruntime-cuda", "cuda", INSTALL_CUDA),
    # Its library wants that of TensorRT 10, which headpool build's backend tensorrt, of 11, is not.
    TENSORRT: Provider("onnxruntime-tensorrt", "cuda", f"{INSTALL_CUDA} 'tensorrt-cu13>=10.15,<11'", "trt", links="tensorrt"),
    TENSORRT_RTX: Provider(
        "onnxruntime-tensorrt-rtx",
        "cuda",
        "pip install 'onnxruntime>=1.31' onnxruntime-ep-nv-tensorrt-rtx",
        "nv",
        "onnxruntime_ep_nv_tensorrt_rtx",
    ),
}


def require_provider(name: str) -> None:
    """Raises EngineError, with the command that installs it, where the onnxruntime here has no `name`, or no device for it."""
    import onnxruntime

    provider, here = PROVIDERS[name], f"onnxruntime {onnxruntime.__version__} here"
    if provider.plugin:
        if not _devices(name):
            raise EngineError(f"{here} finds no GPU for {name}; it needs an NVIDIA GPU of the Ampere generation or later")
    elif name not in (available := onnxruntime.get_available_providers()):
        raise EngineError(f"{here} has no {name} (it has {', '.join(available)}): {provider.install}")
    if provider.links:
        _link(provider)


def check_form(name: str, pattern: str, cache: CacheForm, what: str) -> None:
    """Refuse a form of graph, of `what`, that a provider which compiles engines does not take. Raises EngineError."""
    provider = PROVIDERS[name]
    if provider.compiles and not is_engine_form(pattern, cache):
        raise EngineError(
            f"{what} ({pattern}, {cache} cache) does not run on {provider.backend}, which takes the patterns "
            f"{' and '.join(ENGINE_PATTERNS)} with a static cache: headpool export … --pattern attention"
        )


def start(graph: str | bytes | Path, options: Any, name: str, own: dict[str, str] | None = None) -> Any:
    """An InferenceSession on provider `name`, with the provider's `own` options; what a compiling one has no layer for runs on
    CUDA. Raises what the runtime raises, EngineError where it fell back to another provider."""
    import onnxruntime

    provider = PROVIDERS[name]
    if provider.plugin:
        options.add_provider_for_devices(_devices(name), own or {})
        runtime = onnxruntime.InferenceSession(graph, options, enable_fallback=0)
    else:
        others = [CUDA] if provider.compiles else []
        providers = [(name, own or {}), *others]
        runtime = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)  # which would print
    if (running := runtime.get_providers()[0]) != name:
        raise EngineError(f"onnxruntime could not start {name} and fell back to {running}; check the driver and CUDA")
    return runtime


def fixed(shape: Sequence[int | str], sizes: dict[str, int]) -> list[int | str]:
    """The shape with the numbers of `sizes` in it."""
    return [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape]


def compiling_options(
    prefix: str, dtype: str, bindings: Sequence[Binding], sizes: dict[str, int], chunk: int
) -> dict[str, str]:
    """The optimisation profile: one new token a sequence to `chunk`, tuned for one; and the precision, which is the graph's."""
    profile = {}
    opened = [binding for binding in bindings if "sequence" in binding.shape]
    for word, tokens in (("min", 1), ("opt", 1), ("max", chunk)):
        shapes = [(b.name, fixed(b.shape, {**sizes, "sequence": tokens})) for b in opened]
        profile[f"{prefix}_profile_{word}_shapes"] = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)
    precision = {f"trt_{dtype}_enable": "1"} if prefix == "trt" and dtype != "fp32" else {}
    return {**profile, **precision}


def _link(provider: Provider) -> None:
    """Load what the provider links: the loader would not look for it in a Python package. Raises EngineError."""
    need = f"backend {provider.backend} needs {provider.links} 10"
    try:
        version = importlib.import_module(provider.links).__version__
    except (ImportError, AttributeError) as error:
        raise EngineError(f"{need}, not here ({error}): {provider.install}") from None
    if version.partition(".")[0] != "10":
        raise EngineError(f"{need}, here is {version}: {provider.install}")


def _devices(name: str) -> list[Any]:
    """Those that a plugin finds; it is registered once a process. Raises EngineError where it is not there."""
    import onnxruntime

    provider = PROVIDERS[name]
    try:
        plugin = importlib.import_module(provider.plugin)
    except ImportError as error:
        raise EngineError(
            f"backend {provider.backend} needs {provider.plugin}, which is not installed: {provider.install}"
        ) from error
    if name not in _registered:
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # the runtime raises classes of its own that have no public base
            raise EngineError(f"{provider.plugin} does not load: {' '.join(str(error).split())[:300]}") from None
        _registered.add(name)
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name][:1]  # caches lie on the first


_registered: set[str] = set()
