"""`headpool build`: the static-cache graphs of a bundle → parsed, verified, compiled, recorded. What is unchanged is kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from exporter.bundle import Bundle
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.apart import keep_apart
from exporter.engines.tensorrt.api import Api, Messages, load
from exporter.engines.tensorrt.compile import compile_plan, config_of, profiles_of
from exporter.engines.tensorrt.decompose import allow_decomposing
from exporter.engines.tensorrt.heads import one_head_size
from exporter.engines.tensorrt.network import Network, Parsed, parse
from exporter.engines.tensorrt.parts import Part, parts_of, shape
from exporter.engines.tensorrt.plan import BuildOptions, default_capacity, recipe_of, targets_of, variants_of
from exporter.engines.tensorrt.quantize import quantize_weights
from exporter.engines.tensorrt.record import EngineBinding, EngineRecord, Recipe, Verified
from exporter.engines.tensorrt.verify import check_nodes, verify
from exporter.engines.tensorrt.weights import Source, open_source
from exporter.errors import UserError
from exporter.files import alone_in, replacing

Progress = Callable[[str, int, int], None]


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
    api = load(options.backend)
    variants = variants_of(bundle, options.variants)
    targets = targets_of(api, options)
    parts = [part for variant in variants for part in parts_of(variant)]
    plans = [(part, recipe_of(bundle, part, api, targets, options)) for part in parts]
    folder = bundle.path / record.FOLDER / record.folder_name(options.backend, targets)
    built = []
    try:
        with alone_in(folder):
            for index, (part, recipe) in enumerate(plans):
                built.append(_keep_or_build(bundle, part, recipe, api, folder, report))
                report("engines", index + 1, len(plans))
    finally:
        with contextlib.suppress(OSError):  # where there are engines, or a log
            folder.parent.rmdir()
    return built


def _keep_or_build(bundle: Bundle, part: Part, recipe: Recipe, api: Api, folder: Path, report: Progress) -> Built:
    file, there = f"{_stem(part, recipe)}.engine", {item.file: item for item in record.read(folder)}
    old = there.get(file)
    if old is not None and old.recipe == recipe and old.intact(folder):
        return Built(folder, old, fresh=False)
    there[file] = _build_one(bundle, part, recipe, api, folder, partial(_share, report, f"building {part.label}"))
    record.write(folder, tuple(there[name] for name in sorted(there)))
    return Built(folder, there[file], fresh=True)


def _share(report: Progress, what: str, thousandths: int) -> None:
    report(what, thousandths, 1000)


def _stem(part: Part, recipe: Recipe) -> str:
    """model.g3.onnx → model.g3, and what is not usual of it: model.g3.b4.s1024.int4. Sessions choose by these."""
    usual = default_capacity(part.variant)
    words = {
        f"b{recipe.batch}": recipe.batch != 1,
        f"s{recipe.capacity}": recipe.capacity != usual,
        recipe.quantize: recipe.quantize is not None,
    }
    return ".".join([part.graph.removesuffix(".onnx"), *(str(word) for word, unusual in words.items() if unusual)])


def _build_one(
    bundle: Bundle, part: Part, recipe: Recipe, api: Api, folder: Path, on_progress: Callable[[int], None]
) -> EngineRecord:
    """Parse, verify and compile one part; the log is kept whatever happens, the plan only when it is whole."""
    name, messages, started = _stem(part, recipe), Messages(), time.perf_counter()
    plan = folder / f"{name}.engine"
    try:
        source, parsed, network = prepare(bundle, part, recipe, api, messages)
        saved = source.saved if part.name == "decoder" else part.variant.weight_bytes
        profiles = profiles_of(part, recipe)
        config = config_of(parsed, part, recipe, profiles)
        with replacing(plan) as temporary:
            size, digest = compile_plan(parsed, config, source, temporary, on_progress)
        on_progress(1000)
    except UserError as error:
        raise type(error)(f"{error} (log: {folder / name}.log)" if messages.lines else str(error)) from None
    finally:
        if messages.lines:
            with replacing(folder / f"{name}.log") as temporary:
                temporary.write_text(messages.text(), "utf-8")
    return EngineRecord(
        variant=part.variant.name,
        file=plan.name,
        log=f"{name}.log",
        bytes=size,
        sha256=digest,
        seconds=round(time.perf_counter() - started, 2),
        recipe=recipe,
        profiles=profiles,
        bindings=_bindings(part, recipe),
        network=network,
        part=part.name,
        weight_bytes=part.variant.weight_bytes - saved,
    )


def prepare(bundle: Bundle, part: Part, recipe: Recipe, api: Api, messages: Messages) -> tuple[Source, Parsed, Verified]:
    """Read the graph and its weights, parse it, and verify the network. The source must live until the engine is built."""
    source, quantised = source_of(bundle, part, recipe)
    parsed = parse(api, source, messages)
    network = Network(api.trt, parsed.definition, source.numbers())
    facts = verify(network, part, part.sizes(recipe.batch, recipe.capacity), quantised)
    check_nodes(source, part)
    return source, parsed, facts


def source_of(bundle: Bundle, part: Part, recipe: Recipe) -> tuple[Source, int]:
    """The graph and its weights as an engine is built from them, and refitted with them; how many weights are quantised."""
    variant, source = part.variant, open_source(bundle, part, recipe.batch, recipe.capacity)
    if variant.pattern == "attention":
        one_head_size(source, variant.config)
        allow_decomposing(source, part)
    keep_apart(source)
    quantised = quantize_weights(source, recipe.quantize, variant.dtype) if recipe.quantize is not None else []
    return source, len(quantised)


def _bindings(part: Part, recipe: Recipe) -> tuple[EngineBinding, ...]:
    """As verified: the network has exactly these."""
    sizes = part.sizes(recipe.batch, recipe.capacity)
    given = [("input", binding) for binding in part.inputs] + [("output", binding) for binding in part.outputs]
    return tuple(EngineBinding(b.name, mode, b.dtype, shape(b, sizes), b.alias) for mode, b in given)
