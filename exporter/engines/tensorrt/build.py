"""`headpool build`: each static-cache graph of a bundle → parsed, verified, compiled, recorded. What is unchanged is kept."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from exporter.bundle import Bundle, Variant
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.library import HERE, Library, Messages, load
from exporter.engines.tensorrt.network import Network, Parsed, parse
from exporter.engines.tensorrt.quantize import check_quantize, quantize_weights
from exporter.engines.tensorrt.record import EngineBinding, EngineRecord, Profile, Recipe
from exporter.engines.tensorrt.verify import Sizes, verify
from exporter.engines.tensorrt.weights import Source, open_source
from exporter.errors import BundleError, EngineError, UserError, one_of

PATTERNS = ("attention", "grouped")
COMPATIBLE = ("version", "hardware")
PORTABLE = ("sm80", "sm86", "sm89", "sm120")  # what one tensorrt_rtx engine runs on where nothing is asked for
CAPACITY = 4096  # cache rows where nothing is asked for and the model's context is longer
PREFILL = 512
RELEASE_EVERY = 0.02  # seconds
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    `targets` None: PORTABLE for tensorrt-rtx, the GPU here for tensorrt; `capacity` None: the context, at most CAPACITY;
    `variants` None: every graph of pattern attention or grouped with a static cache.
    """

    backend: str = "tensorrt-rtx"
    targets: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    batch: int = 1
    capacity: int | None = None
    prefill: int | None = None
    optimisation: int | None = None  # 0 … 5
    workspace: int | None = None  # MiB
    strip: bool = False
    compatible: tuple[str, ...] = ()
    quantize: str | None = None


@dataclass(frozen=True)
class Built:
    """An engine of the bundle; `fresh` says whether this call built it."""

    folder: Path
    record: EngineRecord
    fresh: bool


def build(bundle: Bundle, options: BuildOptions, progress: Progress | None = None) -> list[Built]:
    """Build what `options` ask for under `bundle`/engines. Everything is checked before the first build starts.

    Each engine is in place, and in engine.json, before the next is begun, so a build that was stopped goes on where it was.
    Raises EngineError, BundleError, or GraphError where a parsed network deviates from its plan.
    """
    report = progress or (lambda *_: None)
    library = load(options.backend)
    variants = _variants(bundle, options.variants)
    targets = _targets(library, options)
    plans = [(variant, _recipe(bundle, variant, library, targets, options)) for variant in variants]
    folder = bundle.path / record.FOLDER / record.folder_name(options.backend, targets)
    built = []
    for index, (variant, recipe) in enumerate(plans):
        name = _stem(variant, recipe)
        there = {item.file: item for item in record.read(folder)}
        old = there.get(f"{name}.engine")
        fresh = old is None or old.recipe != recipe or not old.intact(folder)
        if fresh:
            folder.mkdir(parents=True, exist_ok=True)
            new = _build_one(bundle, variant, recipe, library, folder, partial(_share, report, f"building {variant.name}"))
            there[new.file] = new
            record.write(folder, tuple(there[file] for file in sorted(there)))
        built.append(Built(folder, there[f"{name}.engine"], fresh))
        report("engines", index + 1, len(plans))
    return built


def _share(report: Progress, what: str, thousandths: int) -> None:
    report(what, thousandths, 1000)


def _stem(variant: Variant, recipe: Recipe) -> str:
    """model.g3.onnx → model.g3, or model.g3.int4 with quantised weights."""
    return variant.graph.removesuffix(".onnx") + (f".{recipe.quantize}" if recipe.quantize else "")


def _variants(bundle: Bundle, names: tuple[str, ...] | None) -> list[Variant]:
    chosen = [bundle.variant(name) for name in dict.fromkeys(names)] if names else list(bundle.variants)
    fitting = [variant for variant in chosen if variant.pattern in PATTERNS and variant.cache == "static"]
    if len(fitting) < len(chosen) and (names or not fitting):
        there = ", ".join(f"{v.name} ({v.pattern}, {v.cache} cache)" for v in chosen if v not in fitting)
        raise BundleError(
            f"{bundle.path}: {there} cannot become an engine; TensorRT takes the patterns {' and '.join(PATTERNS)} "
            "with a static cache: headpool export … --pattern attention"
        )
    return fitting


def _targets(library: Library, options: BuildOptions) -> tuple[str, ...]:
    asked = options.targets or (PORTABLE if library.rtx else (HERE,))
    if not library.rtx and asked != (HERE,):
        raise EngineError(f"backend tensorrt builds for the GPU it runs on, not for {', '.join(asked)}; leave --target out")
    library.check_targets(asked)
    if asked == (HERE,):
        from exporter.engines.tensorrt.device import compute_capability

        return (compute_capability(),)
    return tuple(sorted(asked, key=lambda name: int(name[2:])))


def _recipe(bundle: Bundle, variant: Variant, library: Library, targets: tuple[str, ...], options: BuildOptions) -> Recipe:
    """The engine's recipe. Raises EngineError for sizes and features that cannot be."""
    limit = variant.config.max_positions
    capacity = min(limit, CAPACITY) if options.capacity is None else options.capacity
    prefill = min(capacity, PREFILL) if options.prefill is None else options.prefill
    for what, value, most in (("batch", options.batch, 2**16), ("capacity", capacity, limit), ("prefill", prefill, capacity)):
        if not 1 <= value <= most:
            whose = {"batch": "", "capacity": ", the model's context", "prefill": ", the capacity"}[what]
            raise EngineError(f"{what} {value} is not a whole number from 1 to {most}{whose}")
    if options.optimisation is not None and not 0 <= options.optimisation <= 5:
        raise EngineError(f"optimisation level {options.optimisation} is not a whole number from 0 to 5")
    if options.workspace is not None and options.workspace < 1:
        raise EngineError(f"workspace {options.workspace} MiB is not a whole number from 1")
    for word in options.compatible:
        if word not in COMPATIBLE:
            raise EngineError(one_of("compatible", word, COMPATIBLE))
    if options.compatible and library.rtx:
        raise EngineError("--compatible is of backend tensorrt; a tensorrt-rtx engine runs on the chips that --target names")
    if variant.dtype == "bf16" and "sm75" in targets:
        raise EngineError(f"variant {variant.name} is bf16, which sm75 lacks; leave sm75 out, or export it in fp16")
    if variant.pattern == "attention" and (variant.config.head_dim % 8 or not 16 <= variant.config.head_dim <= 256):
        raise EngineError(
            f"variant {variant.name} has heads of {variant.config.head_dim} channels; TensorRT fuses attention for "
            "multiples of 8 from 16 to 256: export it with --pattern grouped"
        )
    check_quantize(options.quantize, variant, targets)
    return Recipe(
        graph_sha256=_file_hash(bundle.graph_path(variant)),
        weights_sha256={name: _file_hash(bundle.path / name) for name in variant.weights},
        backend=library.backend,
        module=library.trt.__name__,
        version=library.version,
        targets=targets,
        batch=options.batch,
        capacity=capacity,
        prefill=prefill,
        optimisation=options.optimisation,
        workspace_bytes=None if options.workspace is None else options.workspace << 20,
        strip=options.strip,
        compatible=tuple(sorted(options.compatible)),
        quantize=options.quantize,
    )


def _file_hash(path: Path) -> str:
    """Variants share weights: a file that is unchanged is read once a process."""
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash(path: Path, _changed: int, _size: int) -> str:
    return record.sha256(path)


def _build_one(
    bundle: Bundle, variant: Variant, recipe: Recipe, library: Library, folder: Path, on_progress: Callable[[int], None]
) -> EngineRecord:
    """Parse, verify and compile one variant; the log is kept whatever happens, the plan only when it is whole."""
    name, messages, started = _stem(variant, recipe), Messages(), time.perf_counter()
    plan = folder / f"{name}.engine"
    try:
        source, parsed, network = prepare(bundle, variant, recipe, library, messages)
        profiles = _profiles(recipe)
        config = _config(parsed, variant, recipe, profiles)
        with record.replacing(plan) as temporary:
            size, digest = _compile(parsed, config, source, temporary, on_progress)
        on_progress(1000)
    except UserError as error:
        raise type(error)(f"{error} (log: {folder / name}.log)") from None
    finally:
        with record.replacing(folder / f"{name}.log") as temporary:
            temporary.write_text(messages.text(), "utf-8")
    return EngineRecord(
        variant=variant.name,
        file=plan.name,
        log=f"{name}.log",
        bytes=size,
        sha256=digest,
        seconds=round(time.perf_counter() - started, 2),
        recipe=recipe,
        profiles=profiles,
        bindings=_bindings(variant, recipe),
        network=network,
    )


def prepare(
    bundle: Bundle, variant: Variant, recipe: Recipe, library: Library, messages: Messages
) -> tuple[Source, Parsed, dict[str, Any]]:
    """Read the graph and its weights, parse it, and verify the network. The source must live until the engine is built."""
    source = open_source(bundle, variant, recipe.batch, recipe.capacity)
    quantised = quantize_weights(source, recipe.quantize, variant.dtype) if recipe.quantize is not None else []
    parsed = parse(library, source, messages)
    facts = verify(Network(library.trt, parsed.definition), variant, Sizes(recipe.batch, recipe.capacity), len(quantised))
    return source, parsed, facts


def _profiles(recipe: Recipe) -> tuple[Profile, ...]:
    return (Profile("prefill", 1, recipe.prefill, recipe.prefill), Profile("decode", 1, 1, 1))


def _bindings(variant: Variant, recipe: Recipe) -> tuple[EngineBinding, ...]:
    """As verified: the network has exactly these."""
    sizes = Sizes(recipe.batch, recipe.capacity)
    given = [("input", binding) for binding in variant.inputs()] + [("output", binding) for binding in variant.outputs()]
    return tuple(EngineBinding(b.name, mode, b.dtype, sizes.shape(b), b.alias) for mode, b in given)


def _config(parsed: Parsed, variant: Variant, recipe: Recipe, profiles: tuple[Profile, ...]) -> Any:
    trt, builder = parsed.library.trt, parsed.builder
    config = builder.create_builder_config()
    if parsed.library.rtx:
        config.num_compute_capabilities = len(recipe.targets)
        for index, target in enumerate(recipe.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if variant.dtype == "fp32":
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
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name in ("input_ids", "position_ids"):
            shapes.set_shape(name, *((recipe.batch, tokens) for tokens in (profile.least, profile.best, profile.most)))
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(f"{trt.__name__} takes no profile {profile.name}: {parsed.messages.reason()}")
    return config


def _compile(parsed: Parsed, config: Any, source: Source, path: Path, on_progress: Callable[[int], None]) -> tuple[int, str]:
    """Build and stream the plan to `path`; its bytes and SHA-256. Raises EngineError with the builder's reason."""
    trt = parsed.library.trt
    with (
        _timing_cache(parsed, config, path.parent),
        _releasing(source),
        _interruptible() as interrupted,
        open(path, "wb") as file,
    ):
        monitor = _monitor(trt, on_progress, interrupted)
        config.progress_monitor = monitor
        writer = _writer(trt, file)
        done = parsed.builder.build_serialized_network_to_stream(parsed.definition, config, writer)
        if interrupted:
            raise KeyboardInterrupt
        if writer.error is not None:
            raise writer.error
        if not done or not writer.size:
            raise EngineError(
                f"{trt.__name__} {parsed.library.version} did not build {source.path.name}: {parsed.messages.reason()}"
            )
        file.flush()
        os.fsync(file.fileno())
    return writer.size, writer.digest.hexdigest()


@contextmanager
def _timing_cache(parsed: Parsed, config: Any, folder: Path) -> Iterator[None]:
    """Kernel timings, kept beside the engines for the next build. tensorrt_rtx times nothing when it builds."""
    if parsed.library.rtx:
        yield
        return
    path = folder / "timing.cache"
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    yield
    with record.replacing(path) as temporary:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))


@contextmanager
def _releasing(source: Source) -> Iterator[None]:
    """Hand back the weights' pages while the builder, which has copies of its own by then, goes on."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(RELEASE_EVERY):
            source.release()

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


def _monitor(trt: Any, on_progress: Callable[[int], None], interrupted: list[int]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Phases nest; a phase's share is one step of its parent."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}  # steps done, steps; the outermost first
            self.most = 0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (0, max(1, steps))

        def step_complete(self, name: str, step: int) -> bool:
            self.phases[name] = (step + 1, self.phases[name][1])
            self.tell()
            return not interrupted

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)
            self.tell()

        def tell(self) -> None:
            done, share = 0.0, 1.0
            for steps_done, steps in self.phases.values():
                done, share = done + share * min(1.0, steps_done / steps), share / steps
            self.most = max(self.most, int(1000 * min(done, 1.0)))  # phases may come again
            on_progress(self.most)

    return Monitor()


def _writer(trt: Any, file: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size, self.digest = 0, hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:  # raised here it would get lost in the builder
                self.error = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    return Writer()
