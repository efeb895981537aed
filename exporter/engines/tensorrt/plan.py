"""What `headpool build` is asked for, checked: which graphs, for which chips, and the recipe of each engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from exporter.bundle import Bundle, Seq2SeqVariant, Variant
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.api import HERE, Api
from exporter.engines.tensorrt.parts import Part, unfit
from exporter.engines.tensorrt.quantize import check_quantize
from exporter.engines.tensorrt.record import Recipe
from exporter.errors import BundleError, EngineError, one_of

COMPATIBLE = ("version", "hardware")
PORTABLE = ("sm80", "sm86", "sm89", "sm120")  # what one tensorrt_rtx engine runs on where nothing is asked for
CAPACITY = 4096  # cache rows where nothing is asked for and the model's context is longer
PREFILL = 512
FUSED_BYTES = 48 << 10  # of a query and its scores: more has no fused kernel (measured by profiles/benchmarks/fused_rows.py)


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    `targets` None: PORTABLE for tensorrt-rtx, the GPU here for tensorrt; `capacity` None: the context, at most CAPACITY;
    `prefill` None: PREFILL, of an encoder-decoder the
    longest input; `variants` None: every graph that can become an engine.
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


def variants_of(bundle: Bundle, names: tuple[str, ...] | None) -> list[Variant]:
    """The graphs that are asked for; without names all that can become engines. Raises BundleError."""
    chosen = [bundle.variant(name) for name in dict.fromkeys(names)] if names else list(bundle.variants)
    reasons = [reason for variant in chosen if (reason := unfit(variant)) is not None]
    if reasons and (names or len(reasons) == len(chosen)):
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise BundleError(f"{bundle.path}: variant {reasons[0]}{more}")
    return [variant for variant in chosen if unfit(variant) is None]


def targets_of(api: Api, options: BuildOptions) -> tuple[str, ...]:
    """The chips to build for, in order. Raises EngineError for one that TensorRT does not build for."""
    asked = options.targets or (PORTABLE if api.rtx else (HERE,))
    if not api.rtx and asked != (HERE,):
        raise EngineError(f"backend tensorrt builds for the GPU it runs on, not for {', '.join(asked)}; leave --target out")
    api.check_targets(asked)
    if options.strip and api.rtx and asked != (HERE,):
        raise EngineError(
            f"{api.trt.__name__} {api.version} builds an engine without weights on the GPU it is for; "
            f"leave --strip out, or build there with --target {HERE}"
        )
    if asked == (HERE,):
        from exporter.engines.tensorrt.device import compute_capability

        return (compute_capability(),)
    return tuple(sorted(asked, key=lambda name: int(name[2:])))


def default_capacity(variant: Variant) -> int:
    """Cache rows of an engine where nothing is asked for."""
    return min(variant.config.max_positions, CAPACITY)


def recipe_of(bundle: Bundle, part: Part, api: Api, targets: tuple[str, ...], options: BuildOptions) -> Recipe:
    """The engine's recipe. Raises EngineError for sizes and features that cannot be."""
    variant = part.variant
    limit = variant.config.max_positions
    capacity = default_capacity(variant) if options.capacity is None else options.capacity
    # An encoder-decoder's prefill is its input, which is in none of the caches that have a capacity.
    longest, whose_longest = (limit, ", the model's context") if part.grows == "encoder" else (capacity, ", the capacity")
    prefill = min(longest, PREFILL) if options.prefill is None else options.prefill
    for what, value, most in (("batch", options.batch, 2**16), ("capacity", capacity, limit), ("prefill", prefill, longest)):
        if not 1 <= value <= most:
            whose = {"batch": "", "capacity": ", the model's context", "prefill": whose_longest}[what]
            raise EngineError(f"{what} {value} is not a whole number from 1 to {most}{whose}")
    _check_rows(part, {"capacity": capacity, "prefill": prefill})
    if options.optimisation is not None and not 0 <= options.optimisation <= 5:
        raise EngineError(f"optimisation level {options.optimisation} is not a whole number from 0 to 5")
    if options.workspace is not None and options.workspace < 1:
        raise EngineError(f"workspace {options.workspace} MiB is not a whole number from 1")
    for word in options.compatible:
        if word not in COMPATIBLE:
            raise EngineError(one_of("compatible", word, COMPATIBLE))
    if options.compatible and api.rtx:
        raise EngineError("--compatible is of backend tensorrt; a tensorrt-rtx engine runs on the chips that --target names")
    if "sm75" in targets and (variant.dtype == "bf16" or (api.rtx and variant.dtype == "fp32")):
        other = "" if isinstance(variant, Seq2SeqVariant) else ", or export it in fp16"  # which T5 overflows
        lacks = "bf16" if variant.dtype == "bf16" else "products of fp32"
        raise EngineError(f"variant {variant.name} is {variant.dtype}, and sm75 lacks {lacks}; leave sm75 out{other}")
    check_quantize(options.quantize, variant, targets)
    return Recipe(
        graph_sha256=_file_hash(bundle.path / part.graph),
        weights_sha256={name: _file_hash(bundle.path / name) for name in variant.weights},
        backend=api.backend,
        module=api.trt.__name__,
        version=api.version,
        targets=targets,
        batch=options.batch,
        capacity=capacity,
        prefill=prefill,
        optimisation=options.optimisation,
        workspace_bytes=None if options.workspace is None else options.workspace << 20,
        strip=options.strip,
        compatible=tuple(sorted(options.compatible)),
        quantize=options.quantize,
        code_sha256=_code(),
    )


def fused_rows(variant: Variant) -> int:
    """The most rows that attention has a fused kernel for."""
    return FUSED_BYTES // (4 if variant.dtype == "fp32" else 2) - variant.config.head_dim


def _check_rows(part: Part, sizes: Mapping[str, int]) -> None:
    """Raises EngineError where attention that must be fused is over more rows than there are kernels for."""
    dtype, most = part.variant.dtype, fused_rows(part.variant)
    read = {"capacity": part.name == "decoder", "prefill": part.grows == "encoder"}  # cross-attention's: of the input
    for what in (what for what, is_read in read.items() if is_read and sizes[what] > most):
        if part.variant.pattern == "attention" and not all(attention.decomposable for attention in part.attention):
            raise EngineError(
                f"{what} {sizes[what]}: TensorRT has no fused kernel for attention over more than {most} rows in {dtype}; "
                f"lower --{what}, or export --pattern grouped"
            )


@cache
def _code() -> str:
    """Of the modules beside this one: what another headpool would build of the same graph may be another engine."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    """Variants share weights: a file that is unchanged is read once a process."""
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash(path: Path, _changed: int, _size: int) -> str:
    return record.sha256(path)
