"""The export stage: a checkpoint becomes a bundle with one graph for each KV-head count and pattern.

    checkpoint → (fewer KV heads) → canonical graph → lowered graphs, weights streamed once, manifest

Weights never meet the tracer: graphs name them, and the layout writes or links their bytes beside the graphs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import contract
from exporter.background import Background
from exporter.bundle import MANIFEST, Bundle, Seq2SeqVariant, Variant
from exporter.checkpoint import Checkpoint, check_finite, hf_config_for, scan, stored_dtype
from exporter.checkpoint.expected import EMBEDDING, HEAD, POSITIONS
from exporter.checkpoint.t5_names import unread_in_decoding
from exporter.config import CACHE_FORMS, DTYPES, CacheForm, ModelConfig, check_groups
from exporter.convert import GROUPINGS, METHODS, Converter, Grouping, Method, conversion_record
from exporter.errors import UserError, one_of
from exporter.files import new_folder, refuse_existing
from exporter.genai import genai_config
from exporter.layout import STORAGES, Layout, Storage
from exporter.quantise import QUANTIZE, Quantiser, check_quantise, quantised_names
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.tokenizer import check_tokenizer
from exporter.trace import IR_DTYPES, canonical_graph
from exporter.trace_seq2seq import canonical_graphs
from exporter.weights import TORCH_DTYPES, Weights
from graphs.caches import CACHES
from graphs.canonical import GroupedAttention, standalone
from graphs.lower import check_cache, lower
from graphs.patterns import PATTERNS
from graphs.quantise import FORMS, Form, stored_as
from graphs.verify import check_model

# The cache form a pattern is normally used with: `repeat` is what others export, the rest run in place.
DEFAULT_CACHE: dict[str, CacheForm] = {
    "repeat": "concat",
    "grouped": "static",
    "attention": "static",
    "gqa": "static",
    "fused": "static",
}
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclass(frozen=True)
class ExportOptions:
    """What to make. `groups` None keeps the checkpoint's KV heads; `cache` None takes each pattern's own form."""

    groups: tuple[int | tuple[int, ...], ...] | None = None  # of every layer, or one number a layer
    method: Method = "mean"
    grouping: Grouping = "contiguous"
    calibration: str | None = None  # None is `self` where the method reads tokens; quantising is calibrated on what there is
    seed: int = 0
    patterns: tuple[str, ...] = ("grouped",)
    cache: CacheForm | None = None
    dtype: str = "fp32"
    logits: contract.Logits = "last"
    storage: Storage = "copy"
    quantize: str | None = None  # a form of graphs/quantise.py: the matrices; all else stays in `dtype`
    cache_dtype: str | None = None  # fp16, int8: the caches, of the pattern fused; None: in `dtype`

    def __post_init__(self) -> None:
        choices: list[tuple[str, Any, Any]] = [("pattern", pattern, PATTERNS) for pattern in self.patterns]
        choices += [("dtype", self.dtype, DTYPES), ("logits", self.logits, ("last", "all"))]
        choices += [("method", self.method, METHODS), ("grouping", self.grouping, GROUPINGS)]
        choices += [("weights", self.storage, STORAGES)]
        choices += [("cache", self.cache, CACHE_FORMS)] if self.cache is not None else []
        choices += [("quantize", self.quantize, QUANTIZE)] if self.quantize is not None else []
        choices += [("cache dtype", self.cache_dtype, CACHES)] if self.cache_dtype is not None else []
        for what, value, allowed in choices:
            if value not in allowed:
                raise UserError(one_of(what, value, allowed))
        for what, values in (("pattern", self.patterns), ("group count", self.groups or (0,))):
            if not values or len(set(values)) != len(values):
                raise UserError(f"{what}s {', '.join(map(str, values))}: name each once, and at least one")


def export(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions,
    progress: Progress | None = None,
    convert: Converter | Quantiser | None = None,
) -> Bundle:
    """Write the bundle `out` (which must not exist) and open it. Nothing is left behind when anything fails.

    `convert` is `converter(checkpoint, options, …)`, given by callers who want its conversions for more than this.
    """
    report = progress or (lambda *_: None)
    config = checkpoint.config
    check_options(config, options)
    refuse_existing(out)
    check_tokenizer(checkpoint.side_files, checkpoint.name)
    convert = convert or converter(checkpoint, options, report)
    with new_folder(out) as folder:
        hashing = Background(scan, checkpoint.files)  # the files are read while the graphs are traced
        models: dict[str, tuple[ModelConfig, Weights]] = {}
        for kv_heads in options.groups or (config.kv_heads,):
            model, weights = convert(kv_heads)
            models[_label(model)] = model, weights
        layout = _lay_out(folder, models, options, report)
        checking = Background(_check_linked, layout)
        rounding = convert.record if isinstance(convert, Quantiser) else None
        variants = _write_graphs(folder, config, models, layout, options, rounding, report)
        report("hashing the checkpoint", 0, 1)
        source = {"name": checkpoint.name, "sha256": hashing.result() if checkpoint.files else None}
        checking.result()
        report("hashing the checkpoint", 1, 1)
        bundle = Bundle(out, tuple(variants), source, tool_versions())
        _write_side_files(folder, checkpoint, variants[0])
        _write_json(folder / MANIFEST, bundle.to_json())
    return Bundle.open(out)


def converter(checkpoint: Checkpoint, options: ExportOptions, progress: Progress) -> Converter | Quantiser:
    """What makes of `checkpoint` and a number of KV heads the weights to store, as `options` say."""
    how = (options.method, options.seed, options.grouping, options.calibration, progress)
    convert = Converter(checkpoint, *how, quantised=options.quantize is not None)
    return convert if options.quantize is None else Quantiser(convert, options.quantize)


def check_options(config: ModelConfig, options: ExportOptions) -> None:
    """Refuse KV heads or a pattern that do not fit before any weight is written. Raises UserError."""
    for count in options.groups or ():
        if isinstance(count, int):
            check_groups(config.num_heads, count)
    if isinstance(config, Seq2SeqConfig) and options.dtype == "fp16":
        raise UserError("fp16 is too narrow for the feed-forward layers of a T5, which overflow in it; choose fp32 or bf16")
    if isinstance(config, Seq2SeqConfig) and options.cache_dtype is not None:
        raise UserError("caches of an encoder-decoder are stored in --dtype; leave --cache-dtype out")
    if options.quantize is not None:
        check_quantise(config)
    models = [config.with_kv_heads(count) for count in options.groups or (config.kv_heads,)]
    counts = sorted({count for model in models for count in model.kv_heads})
    for pattern in options.patterns:
        check_cache(pattern, options.cache_dtype)
    for pattern, count in itertools.product(options.patterns, counts):
        static = (options.cache or DEFAULT_CACHE[pattern]) == "static"
        sizes = {"head_dim": config.head_dim, "value_dim": config.value_dim}
        biased = isinstance(config, Seq2SeqConfig)
        model = standalone(config.num_heads, count, static=static, dtype=IR_DTYPES[options.dtype], biased=biased, **sizes)
        node = model.graph.node(0)
        if (reason := PATTERNS[pattern].check(GroupedAttention(node))) is not None:
            raise UserError(f"pattern {pattern} does not fit this model: {reason}")


def _label(config: ModelConfig) -> str:
    """ "g4"; where layers differ, "g" and the counts' mean is no name, so the sum: "gsum90"."""
    distinct = set(config.kv_heads)
    return f"g{config.kv_heads[0]}" if len(distinct) == 1 else f"gsum{sum(config.kv_heads)}"


def _lay_out(folder: Path, models: dict[str, tuple[ModelConfig, Weights]], options: ExportOptions, report: Progress) -> Layout:
    dtype = TORCH_DTYPES[options.dtype]
    distinct = {id(tensor): tensor for _, weights in models.values() for tensor in weights.values()}
    total = sum(math.prod(tensor.shape) * stored_dtype(tensor, dtype).itemsize for tensor in distinct.values())
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        report("writing weights", done, total)

    layout = Layout(folder, dtype, options.storage, wrote)
    layout.write({label: weights for label, (_, weights) in models.items()})
    return layout


def _check_linked(layout: Layout) -> None:
    """NaN and infinite weights: those that are copied are checked on the way, those that are linked are read for it."""
    for tensor in layout.linked:
        check_finite(tensor)


def _write_graphs(
    folder: Path,
    original: ModelConfig,
    models: dict[str, tuple[ModelConfig, Weights]],
    layout: Layout,
    options: ExportOptions,
    rounding: dict[str, Any] | None,
    report: Progress,
) -> list[Variant]:
    variants: list[Variant] = []
    total = len(models) * len(options.patterns)
    form = FORMS[options.quantize] if options.quantize is not None else None
    for label, (config, weights) in models.items():
        canonical: dict[CacheForm, dict[str, ir.Model]] = {}
        for pattern in options.patterns:
            report("tracing and lowering graphs", len(variants), total)
            cache = options.cache or DEFAULT_CACHE[pattern]
            if cache not in canonical:
                canonical[cache] = _canonical(config, cache, options)
            name = label if len(options.patterns) == 1 else f"{label}.{pattern}"
            graphs = [f"{stem}.onnx" if total == 1 else f"{stem}.{name}.onnx" for stem in canonical[cache]]
            for graph, whole in zip(graphs, canonical[cache].values(), strict=True):
                names = quantised_names(weights, form) if form else ()
                model = lower(whole, pattern, form, names, options.cache_dtype)
                _attach(model, weights, layout, folder)
                ir.save(model, folder / graph)
                check_model(folder / graph)
            files = tuple(sorted({layout.place(tensor).file for tensor in weights.values()}))
            record = conversion_record(original, config, options.method, options.seed, options.grouping, options.calibration)
            size = _weight_bytes(config, weights, layout, form)
            variants.append(
                _variant(
                    graphs,
                    name=name,
                    config=config,
                    pattern=pattern,
                    cache=cache,
                    dtype=options.dtype,
                    quantize=options.quantize,
                    cache_dtype=options.cache_dtype,
                    rounding=rounding,
                    logits=options.logits,
                    weights=files,
                    weight_bytes=size,
                    conversion=record,
                )
            )
    report("tracing and lowering graphs", total, total)
    return variants


def _canonical(config: ModelConfig, cache: CacheForm, options: ExportOptions) -> dict[str, ir.Model]:
    """File name without its suffix → canonical graph; the one that decodes comes last."""
    if isinstance(config, Seq2SeqConfig):
        return canonical_graphs(config, cache, options.dtype, options.logits)
    return {"model": canonical_graph(config, cache, options.dtype, options.logits)}


def _variant(graphs: list[str], **given: Any) -> Variant:
    *others, graph = graphs
    if not others:
        return Variant(graph=graph, **given)
    encoder, *first = others
    return Seq2SeqVariant(graph=graph, encoder=encoder, first=first[0] if first else None, **given)


def _attach(model: ir.Model, weights: Weights, layout: Layout, folder: Path) -> None:
    """Point every weight of the graph at its bytes."""
    named = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    for name, value in named.items():
        tensor = weights[stored_as(name)]
        place = layout.place(tensor)
        assert value.dtype is not None
        assert value.shape is not None
        assert math.prod(value.shape.numpy()) == math.prod(tensor.shape), (name, value.shape, tensor.shape)
        value.const_value = ir.ExternalTensor(
            place.file, place.offset, place.nbytes, value.dtype, shape=value.shape, name=name, base_dir=folder
        )


def _weight_bytes(config: ModelConfig, weights: Weights, layout: Layout, form: Form | None) -> int:
    """What one decode step reads: everything, but of an embedding (the head apart) only one row a sequence."""
    if isinstance(config, Seq2SeqConfig):
        return sum(layout.place(t).nbytes for name, t in weights.items() if not unread_in_decoding(config, name))
    unread = {POSITIONS, HEAD if config.tied else EMBEDDING}
    unread |= {part for name in unread if form is not None for part in form.parts(name)}
    return sum(layout.place(tensor).nbytes for name, tensor in weights.items() if name not in unread)


def _write_side_files(folder: Path, checkpoint: Checkpoint, variant: Variant) -> None:
    """config.json, genai_config.json and the tokenizer's files, as Hugging Face and onnxruntime-genai read them."""
    for name, content in checkpoint.side_files.items():
        (folder / name).write_bytes(content)
    _write_json(folder / "config.json", hf_config_for(variant.config, checkpoint.hf_config, TORCH_DTYPES[variant.dtype]))
    same_size = variant.config.value_dim == variant.config.head_dim
    decoder = same_size and not isinstance(variant, Seq2SeqVariant)
    if isinstance(variant.groups, int) and decoder:  # onnxruntime-genai can name neither KV heads per layer nor two sizes
        _write_json(folder / "genai_config.json", genai_config(variant))


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def tool_versions() -> dict[str, str]:
    """Versions of headpool (where it is installed, and not run from a checkout alone) and of what wrote the graphs."""
    found = {}
    for name in ("headpool", "torch", "onnx", "onnx-ir", "onnxscript"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
