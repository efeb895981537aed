"""What this machine can build and run, and why not the rest: tried, not guessed.

ONNX Runtime is asked for each pattern by opening a session on one attention node; the other packages by looking them up.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import psutil

from exporter.config import CacheForm, ModelConfig
from exporter.engines.providers import CUDA, PROVIDERS, TENSORRT, TENSORRT_RTX, check_form, require_provider, start
from exporter.engines.tensorrt.api import load
from exporter.engines.tensorrt.device import check_device, compute_capability
from exporter.errors import EngineError
from exporter.units import size
from graphs.caches import CACHES
from graphs.canonical import standalone
from graphs.errors import GraphError
from graphs.lower import lower
from graphs.patterns import PATTERNS

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def diagnose() -> dict[str, Any]:
    """{"machine": …, "checks": [{"what", "ok", "detail"}]}; every check is tried, none raises."""
    checks = [
        _check("checkpoints, conversion, export", _torch),
        _check("ONNX Runtime on the CPU", _onnxruntime),
        *_patterns(),
        *(
            _check(f"ONNX Runtime on {what}", functools.partial(check_provider, name))
            for what, name in (("CUDA", CUDA), ("TensorRT", TENSORRT), ("TensorRT for RTX", TENSORRT_RTX))
        ),
        *(
            _check(f"{backend}: {what}", functools.partial(probe, backend))
            for backend in ("tensorrt-rtx", "tensorrt")
            for what, probe in (("build", _tensorrt_builds), ("run", _tensorrt_runs))
        ),
        _check("onnxruntime-genai", lambda: _package(("onnxruntime-genai", "onnxruntime-genai-cuda"), "genai")),
        _check("optimum-onnx", lambda: _package(("optimum-onnx",), "optimum")),
        _check("uptrain: data of Hugging Face", lambda: _package(("datasets",), "uptrain")),
        _check("uptrain: TensorBoard files", lambda: _package(("tensorboardX",), "uptrain")),
        _check("C++ compiler (scripts/ops)", _compiler),
    ]
    machine = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    return {"machine": machine, "checks": checks}


def render(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    head = f"{machine['system']}, Python {machine['python']}, {machine['cores']} cores, {size(machine['memory_bytes'])}"
    width = max(len(check["what"]) for check in report["checks"])
    return [head, *(f"  {'yes' if c['ok'] else 'no ':3}  {c['what']:<{width}}  {c['detail']}" for c in report["checks"])]


def _check(what: str, probe: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"what": what, "ok": True, "detail": probe()}
    except Exception as error:  # the reason is the answer
        return {"what": what, "ok": False, "detail": _short(error, 300)}


def _short(error: Exception, width: int) -> str:
    """Its message in one line, cut after a word; without the code that ONNX Runtime puts before it."""
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    return textwrap.shorten(message, width, placeholder=" …")


def _torch() -> str:
    version = importlib.metadata.version("torch")
    import torch

    return f"torch {version}, {'CUDA ' + torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'}"


def _onnxruntime() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, providers {', '.join(onnxruntime.get_available_providers())}"


def check_provider(name: str) -> str:
    """Opens an attention node on an execution provider of ONNX Runtime; its name. Raises where that does not work."""
    _open(standalone(4, 2, 64, dtype=ir.DataType.FLOAT16), "attention" if PROVIDERS[name].compiles else "gqa", name)
    return name


def check_runs(
    provider: str, config: ModelConfig, pattern: str, cache: CacheForm, dtype: str, cache_dtype: str | None = None
) -> None:
    """Opens one attention node of each KV-head count of `config` on an execution provider of ONNX Runtime.

    It takes milliseconds, and tells what a whole model would after minutes of export. Raises EngineError where none opens.
    """
    check_form(provider, pattern, cache, "a graph")
    for count in sorted(set(config.kv_heads)):
        static, data = cache == "static", DTYPES[dtype]
        node = standalone(config.num_heads, count, config.head_dim, static, data, value_dim=config.value_dim)
        try:
            _open(node, pattern, provider, cache_dtype)
        except EngineError:
            raise
        except Exception as error:  # the runtime raises classes of its own that have no public base
            raise EngineError(
                f"onnxruntime cannot run pattern {pattern}, {cache} cache, {dtype} on {provider}: {_reason(error, dtype)}; "
                "choose another --dtype, --pattern, --cache or --backend"
            ) from None


def _tensorrt_builds(backend: str) -> str:
    api = load(backend)
    if not api.chips():
        check_device()  # it builds for the GPU of this machine only
    return f"{api.trt.__name__} {api.version}, for {', '.join(api.chips()) or compute_capability()}"


def _tensorrt_runs(backend: str) -> str:
    load(backend)
    check_device()
    return f"on {compute_capability()}"


def _compiler() -> str:
    name = os.environ.get("CXX", "c++")
    if (path := shutil.which(name)) is None:
        raise RuntimeError(f"{name} was not found; g++ from 12 or clang from 15 on builds the operators of the pattern fused")
    return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]


def _package(names: tuple[str, ...], extra: str) -> str:
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError(f"{names[0]} is not installed; install the extra headpool[{extra}]")


def _patterns() -> list[dict[str, Any]]:
    """For each pattern, the cache forms and dtypes that ONNX Runtime's CPU provider opens a session on."""
    checks = []
    for pattern in PATTERNS:
        works: list[str] = []
        fails: dict[str, list[str]] = {}  # by reason
        stored = CACHES if hasattr(PATTERNS[pattern], "store") else ()
        tried: list[tuple[str, bool, str | None]] = [(dtype, static, None) for dtype in DTYPES for static in (True, False)]
        tried += [("fp32", True, cache) for cache in stored]
        for dtype, static, cache in tried:
            label = f"{cache} cache" if cache else f"{dtype} {'static' if static else 'concat'}"
            try:
                _open(standalone(4, 2, 64, static, DTYPES[dtype]), pattern, "CPUExecutionProvider", cache)
                works.append(label)
            except Exception as error:  # the reason is the answer
                fails.setdefault(_reason(error, dtype), []).append(label)
        detail = "; ".join([", ".join(works)] * bool(works) + [f"not {', '.join(f)} ({why})" for why, f in fails.items()])
        checks.append({"what": f"pattern {pattern} on the CPU", "ok": bool(works), "detail": detail})
    return checks


def _reason(error: Exception, dtype: str) -> str:
    """ONNX Runtime has a class of its own for a node that none of its kernels takes: what it misses is the dtype."""
    if isinstance(error, GraphError):  # a pattern's own reason, after the name of a node that nobody knows
        return str(error).partition(": ")[2]
    return f"no kernel for {dtype}" if type(error).__name__ == "NotImplemented" else _short(error, 120)


def _open(model: ir.Model, pattern: str, provider: str, cache_dtype: str | None = None) -> None:
    import onnxruntime

    require_provider(provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if pattern == "fused":
        from exporter.engines.operators import operator_library

        options.register_custom_ops_library(str(operator_library()))
    graph = ir.to_proto(lower(model, pattern, cache=cache_dtype)).SerializeToString()
    start(graph, options, provider)
