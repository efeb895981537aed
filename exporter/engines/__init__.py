"""Runtimes behind one small interface (base.py), one file each, imported when asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle, Variant
from exporter.engines.base import Session
from exporter.engines.providers import PROVIDERS
from exporter.errors import EngineError, one_of


@dataclass(frozen=True)
class Backend:
    """Where a backend's `open_session` is, what it is given besides the caller's options, and how to get its runtime."""

    module: str
    runtime: str  # the module that has to be importable
    install: str
    options: dict[str, Any] = field(default_factory=dict)


BACKENDS = {
    **{
        provider.backend: Backend("exporter.engines.onnxruntime", "onnxruntime", provider.install, {"provider": name})
        for name, provider in PROVIDERS.items()
    },
    **{
        name: Backend(
            "exporter.engines.tensorrt.session", name.replace("-", "_"), f"pip install 'headpool[{name}]'", {"backend": name}
        )
        for name in ("tensorrt", "tensorrt-rtx")
    },
}


def open_session(
    bundle: Bundle,
    variant: Variant | str | None = None,
    *,
    backend: str = "onnxruntime",
    batch: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
    profile_to: str | Path | None = None,
    engine_weights: str | None = None,
    **options: Any,
) -> Session:
    """A session over one variant of a bundle; without a name, its first.

    `batch` sequences of at most `capacity` tokens (None, or more than it: the model's max_positions); `threads` of one
    operator (None: the physical cores); `profile_to` is the prefix of a profile of the runtime's own, written by `close()`.
    `engine_weights` chooses among TensorRT engines of one variant ("int4"; None: plain weights first). Other options are the
    backend's.
    Raises EngineError when the runtime is missing or cannot run the graph, BundleError for an unknown variant.
    """
    if backend not in BACKENDS:
        raise EngineError(one_of("backend", backend, BACKENDS))
    entry = BACKENDS[backend]
    if not isinstance(variant, Variant):
        variant = bundle.variant(variant)
    limit = variant.config.max_positions  # past it are positions the model was not made for, or a sliding window we lack
    capacity = limit if capacity is None else min(capacity, limit)
    for name, value in (("batch", batch), ("capacity", capacity), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise EngineError(f"{name} {value} is not a whole number from 1")
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        if (error.name or "").split(".")[0] != entry.runtime:
            raise
        raise EngineError(f"backend {backend} needs {entry.runtime}, which is not installed: {entry.install}") from None
    given = {**entry.options, **options}
    if engine_weights is not None:
        if entry.runtime == "onnxruntime":
            raise EngineError(
                f"--engine-weights {engine_weights} is of the backends tensorrt and tensorrt-rtx, not of {backend}"
            )
        given["engine_weights"] = engine_weights
    return module.open_session(bundle, variant, batch=batch, capacity=capacity, threads=threads, profile_to=profile_to, **given)
