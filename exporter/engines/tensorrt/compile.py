"""A parsed network → a plan on disk: the builder's configuration, its run, and what guards it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.engines.tensorrt.callbacks import monitor, writer
from exporter.engines.tensorrt.network import Parsed
from exporter.engines.tensorrt.parts import Part, shape
from exporter.engines.tensorrt.record import Profile, Recipe
from exporter.engines.tensorrt.weights import Source
from exporter.errors import EngineError
from exporter.files import replacing
from exporter.memory import give_memory_back

RELEASE_EVERY = 0.005  # seconds


def profiles_of(part: Part, recipe: Recipe) -> tuple[Profile, ...]:
    """In the order sessions count them: of a decoder's new tokens, or of the tokens of an encoder's input."""
    longest = recipe.prefill
    if part.grows == "encoder":
        return (Profile("input", 1, longest, longest),)
    return (Profile("prefill", 1, longest, longest), Profile("decode", 1, 1, 1))


def config_of(parsed: Parsed, part: Part, recipe: Recipe, profiles: tuple[Profile, ...]) -> Any:
    """The IBuilderConfig of a recipe. Raises EngineError where TensorRT refuses a profile."""
    trt, builder = parsed.api.trt, parsed.builder
    config = builder.create_builder_config()
    if parsed.api.rtx:
        config.num_compute_capabilities = len(recipe.targets)
        for index, target in enumerate(recipe.targets):
            # A chip that has no name there was asked for as the one here: the builder may know it all the same.
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper(), trt.ComputeCapability.CURRENT), index)
    if part.variant.dtype == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 products with fp32's 23 bits
    if recipe.optimisation is not None:
        config.builder_optimization_level = recipe.optimisation
    if recipe.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
    if recipe.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # REFIT may drop biases (TensorRT 11.3 release notes)
    if "version" in recipe.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if "hardware" in recipe.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names in a session's own profile
    sizes = part.sizes(recipe.batch, recipe.capacity)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for binding in (binding for binding in part.inputs if part.grows in binding.shape):
            tokens = (profile.least, profile.best, profile.most)
            shapes.set_shape(binding.name, *(shape(binding, {**sizes, part.grows: count}) for count in tokens))
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(f"{trt.__name__} takes no profile {profile.name}: {parsed.messages.reason()}")
    return config


def compile_plan(
    parsed: Parsed, config: Any, source: Source, path: Path, on_progress: Callable[[int], None]
) -> tuple[int, str]:
    """Build and stream the plan to `path`; its bytes and SHA-256. Raises EngineError with the builder's reason."""
    trt = parsed.api.trt
    with (
        _timing_cache(parsed, config, path.parent),
        _releasing(source),
        _interruptible() as interrupted,
        open(path, "wb") as file,
    ):
        watching, writing = monitor(trt, on_progress, interrupted), writer(trt, file)
        config.progress_monitor = watching
        done = parsed.builder.build_serialized_network_to_stream(parsed.definition, config, writing)
        if interrupted:
            raise KeyboardInterrupt
        if writing.error is not None:
            raise writing.error
        if not done or not writing.size:
            raise EngineError(
                f"{trt.__name__} {parsed.api.version} did not build {source.path.name}: {parsed.messages.reason()}"
            )
        file.flush()
        os.fsync(file.fileno())
    return writing.size, writing.digest.hexdigest()


@contextmanager
def _timing_cache(parsed: Parsed, config: Any, folder: Path) -> Iterator[None]:
    """Kernel timings, kept beside the engines for the next build. tensorrt_rtx times nothing when it builds."""
    if parsed.api.rtx:
        yield
        return
    path = folder / "timing.cache"
    kept = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):  # damaged, or another version's: times are taken anew
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    with replacing(path) as temporary:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))


@contextmanager
def _releasing(source: Source) -> Iterator[None]:
    """Hand back the weights' pages while the builder, which has copies of its own by then, goes on, and what it has freed:
    what compiling leaves behind would else lie beside the weights (SmolLM2 in fp16: 0.77 GB instead of 0.57)."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(RELEASE_EVERY):
            source.release()
            give_memory_back()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Signals that end the program are noted in the list: raised inside a callback they would get lost in the builder."""
    interrupted: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    try:
        old = [signal.signal(kind, lambda number, _: interrupted.append(number)) for kind in kinds]
    except ValueError:  # not the main thread: nothing is delivered here
        yield interrupted
        return
    try:
        yield interrupted
    finally:
        for kind, handler in zip(kinds, old, strict=True):
            signal.signal(kind, handler)
