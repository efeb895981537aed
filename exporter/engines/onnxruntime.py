"""Opening a variant in ONNX Runtime: providers, options, load errors as one line. ort_static.py, ort_concat.py then run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from exporter.bundle import Bundle, Seq2SeqVariant, Variant
from exporter.contract import Binding
from exporter.engines import huge_pages
from exporter.engines.base import Session, SessionInfo
from exporter.engines.cores import physical_cores
from exporter.engines.operators import operator_library
from exporter.engines.ort_concat import ConcatSession
from exporter.engines.ort_seq2seq import OrtSeq2SeqSession
from exporter.engines.ort_static import StaticSession
from exporter.engines.providers import CPU, PROVIDERS, check_form, compiling_options, fixed, require_provider, start
from exporter.errors import EngineError, one_of

TYPES = {  # as sessions call those of their inputs and outputs
    "int64": "tensor(int64)",
    "fp32": "tensor(float)",
    "fp16": "tensor(float16)",
    "bf16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
}
OPTIMISATIONS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def open_session(
    bundle: Bundle,
    variant: Variant,
    *,
    batch: int,
    capacity: int,
    threads: int | None = None,
    profile_to: str | Path | None = None,
    provider: str = CPU,
    optimisation: str = "all",
    chunk: int = 512,
) -> Session:
    """`chunk` is the most tokens a sequence that one prefill call takes, which bounds the memory of the scores."""
    if optimisation not in OPTIMISATIONS:
        raise EngineError(one_of("optimisation", optimisation, OPTIMISATIONS))
    if provider not in PROVIDERS:
        raise EngineError(one_of("provider", provider, PROVIDERS))
    if chunk < 1:
        raise EngineError(f"chunk {chunk} is not a whole number from 1")
    sizes = _sizes(variant, provider, batch, capacity)
    require_provider(provider)
    if profile_to is not None and not Path(profile_to).absolute().parent.is_dir():
        raise EngineError(f"profile prefix {profile_to} is in a folder that does not exist; make the folder first")
    threads = threads or physical_cores()
    bindings = (variant.inputs(), variant.outputs())
    load = partial(_load, variant=variant, threads=threads, provider=provider, optimisation=optimisation)
    own = (
        compiling_options(PROVIDERS[provider].options, variant.dtype, bindings[0], sizes, min(chunk, capacity)) if sizes else {}
    )
    runtime = load(bundle.graph_path(variant), bindings=bindings, profile_to=profile_to, sizes=sizes, own=own)
    info = SessionInfo(
        backend=PROVIDERS[provider].backend,
        provider=provider,
        versions={"onnxruntime": onnxruntime.__version__},
        options={"threads": threads, "optimisation": optimisation, "chunk": chunk},
    )
    if isinstance(variant, Seq2SeqVariant):
        bindings = (variant.encoder_inputs(), variant.encoder_outputs())
        encoder = load(bundle.path / variant.encoder, bindings=bindings, keep=False)
        return OrtSeq2SeqSession(encoder, runtime, variant, batch, capacity, info)
    kind = StaticSession if variant.cache == "static" else ConcatSession
    return kind(runtime, variant, batch, capacity, info)


def _sizes(variant: Variant, provider: str, batch: int, capacity: int) -> dict[str, int]:
    """The dimensions that a provider which compiles engines has to know; none for others. Raises EngineError."""
    if not PROVIDERS[provider].compiles:
        return {}
    if isinstance(variant, Seq2SeqVariant):
        backend = PROVIDERS[provider].backend
        raise EngineError(f"{backend} runs decoders; an encoder-decoder runs on onnxruntime-cuda, tensorrt and tensorrt-rtx")
    check_form(provider, variant.pattern, variant.cache, f"variant {variant.name}")
    return {"batch": batch, "capacity": capacity}


def _use_own_operators(options: Any, graph: Path) -> list[Any]:
    """headpool's operators, and the weights in memory of ours, which is returned: the session needs it as long as it lives."""
    library = operator_library()
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # as with sessions
        reason = " ".join(str(error).split())
        raise EngineError(f"{library} does not load ({reason[:300]}); delete it and run scripts/ops again") from None
    try:
        values, files = huge_pages.initializers(graph)
    except (OSError, MemoryError, ValueError) as error:
        raise EngineError(f"the weights of {graph} cannot be read: {str(error) or 'not enough memory'}") from None
    for name, value in values.items():
        options.add_initializer(name, value)
    return [*values.values(), *files]


def _load(
    graph: Path,
    variant: Variant,
    bindings: tuple[list[Binding], list[Binding]],
    threads: int,
    provider: str,
    optimisation: str,
    profile_to: str | Path | None = None,
    keep: bool = True,
    sizes: dict[str, int] | None = None,
    own: dict[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """With `keep` the memory of a run is there for the next one: not of an encoder, whose long inputs take gigabytes.

    `sizes` are dimensions that are the same number in every call, `own` the provider's options.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = OPTIMISATIONS[optimisation]
    options.log_severity_level = 4  # errors come as exceptions
    options.enable_cpu_mem_arena = keep
    # A new shape each step, of a concat cache, would be planned each time.
    options.enable_mem_pattern = keep and variant.cache == "static"
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    held: list[Any] = []
    if variant.pattern == "fused":
        held = _use_own_operators(options, graph)
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    try:
        runtime = start(graph, options, provider, own)
    except EngineError:
        raise
    except Exception as error:  # the runtime raises classes of its own that have no public base
        reason = f"{' '.join(str(error).split())[:400]}; where a file of the bundle is damaged, export it again"
        if type(error).__name__ == "NotImplemented":  # a node that none of the provider's kernels takes
            reason = f"no kernel for {variant.dtype} in pattern {variant.pattern}; export with another --dtype or --pattern"
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} cannot run {graph.name} (pattern {variant.pattern}, {variant.precision}) "
            f"on {provider}: {reason}"
        ) from None
    for kind, wanted, found in (
        ("inputs", bindings[0], runtime.get_inputs()),
        ("outputs", bindings[1], runtime.get_outputs()),
    ):
        there = [(value.name, value.type, fixed(value.shape, sizes or {})) for value in found]
        if [(b.name, TYPES[b.dtype], fixed(b.shape, sizes or {})) for b in wanted] != there:
            raise EngineError(f"{graph} has other {kind} than its manifest says; it belongs to another bundle, export it again")
    runtime.held = held  # memory of ours that it reads
    return runtime
