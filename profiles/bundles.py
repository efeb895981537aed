"""Profile bundles: open every chosen variant through exporter.engines, measure, and put the results together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporter.bundle import MANIFEST, Bundle, Variant
from exporter.config import ModelConfig
from exporter.engines import open_session
from exporter.engines.tensorrt import record
from exporter.errors import BundleError, EngineError, UserError, one_of
from exporter.seq2seq_config import Seq2SeqConfig
from profiles.arithmetic import ArithmeticProbe
from profiles.bandwidth import BandwidthProbe, floor_seconds
from profiles.breakdown import read_breakdown, read_layers
from profiles.machine import fingerprint, versions
from profiles.measure import OpenSession, Plan, Progress, measure, random_tokens
from profiles.results import Cell, Results, Subject, refuse_twice

BREAKDOWN_STEPS = 16
BREAKDOWN_WARMUP = 4


def profile_bundle(
    bundles: Sequence[str | Path],
    plan: Plan,
    *,
    variants: Sequence[str] | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    engine_weights: str | None = None,
    breakdown: Sequence[int] = (),
    reads: Sequence[tuple[Subject, OpenSession]] = (),
    progress: Progress = lambda done, total, what: None,
) -> Results:
    """Measure `variants` (default: all) of `bundles` in turns, with the memory bandwidth in between.

    `threads` of one operator and of the bandwidth reading; None: one a physical core. `breakdown` names the contexts of
    the plan at which the runtime profiles itself afterwards (its own run: profiling slows a step). `reads` (see reading.py)
    have their turns too.
    Raises BundleError, EngineError and UserError.
    """
    chosen = choose(bundles, variants, plan, breakdown)
    machine, software = fingerprint(), versions()  # before the run: of the code that is now loaded
    subjects: list[tuple[Subject, OpenSession]] = []
    for bundle, variant in chosen:
        given: dict[str, Any] = {"backend": backend, "threads": threads, "engine_weights": engine_weights}
        subject = subject_of(bundle, variant)
        if engine_weights is not None:
            subject = dataclasses.replace(subject, **weights_of(bundle, variant, backend, engine_weights))
        subjects.append((subject, functools.partial(open_session, bundle, variant, **given)))
    probe, arithmetic = BandwidthProbe(threads), ArithmeticProbe(threads)
    probe()
    arithmetic()
    cells = measure([*reads, *subjects], plan, probe=probe, progress=progress)
    arithmetic()
    probe()
    bandwidth = probe.result()
    cells = [dataclasses.replace(cell, floor=floor_seconds(cell, bandwidth.best)) for cell in cells]
    openers = {(subject.bundle_hash, subject.variant): opener for subject, opener in subjects}
    for index, cell in enumerate(cells):
        opener = openers.get((cell.subject.bundle_hash, cell.subject.variant))
        if opener and cell.context in breakdown:
            cells[index] = with_breakdown(cell, opener, plan.seed)
    return Results(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        versions=software,
        settings=json.loads(json.dumps({**dataclasses.asdict(plan), "backend": backend, "threads": threads})),
        cells=tuple(cells),
        bandwidth=bandwidth,
        arithmetic=arithmetic.result(),
    )


def check_plan(plan: Plan, breakdown: Sequence[int], config: ModelConfig) -> None:
    """Refuse what cannot be measured of a model, before anything is: contexts past its own, a breakdown at another context."""
    if unknown := sorted(set(breakdown) - set(plan.contexts)):
        raise UserError(one_of("breakdown context", unknown[0], plan.contexts))
    limit, new, longest = config.max_positions, int("decode" in plan.kinds), max(plan.contexts)
    if longest + new > limit:
        raise UserError(
            f"a context of {longest} tokens{' and the one decoded after it' * new} is more than the model's {limit} "
            f"(max_position_embeddings); choose contexts up to {limit - new}"
        )


def subject_of(bundle: Bundle, variant: Variant) -> Subject:
    """What a figure names of a variant."""
    return Subject(
        model=str(bundle.source.get("name") or bundle.path.name),
        bundle=bundle.path.resolve().name,
        bundle_hash=bundle_hash(bundle, variant),
        variant=variant.name,
        groups=variant.groups,
        heads=variant.config.num_heads,
        pattern=variant.pattern,
        cache=variant.cache,
        dtype=variant.precision,
        weight_bytes=variant.weight_bytes,
        kv_bytes_per_token=variant.kv_bytes_per_token,
        conversion=variant.conversion,
        encoder=isinstance(variant.config, Seq2SeqConfig),
        attention_operations=attention_operations(variant.config),
    )


def weights_of(bundle: Bundle, variant: Variant, backend: str, kind: str) -> dict[str, Any]:
    """What a Subject says of a quantised TensorRT engine's weights."""
    found = [
        engine.weight_bytes
        for _, engine in record.engines_of(bundle.path)
        if (engine.variant, engine.part, engine.recipe.backend) == (variant.name, "decoder", backend)
        and engine.recipe.quantize == kind
        and engine.weight_bytes  # an engine of before says nothing of it
    ]
    return {"dtype": f"{variant.precision}, {kind} weights", "weight_bytes": found[0]} if found else {}


def attention_operations(config: ModelConfig) -> int:
    """Of a decode step for each token of context: a product and a sum for each channel of every query head's K and V."""
    return 2 * config.num_layers * config.num_heads * (config.head_dim + config.value_dim)


def bundle_hash(bundle: Bundle, variant: Variant) -> str:
    """sha256 over the manifest, the variant's graph, and the name and size of each of its weight files.

    Not over the weights themselves: the manifest holds their checkpoint's hash, and latency does not depend on their values.
    """
    digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes())
    digest.update(bundle.graph_path(variant).read_bytes())
    for name in variant.weights:
        digest.update(f"\0{name}\0{(bundle.path / name).stat().st_size}".encode())
    return digest.hexdigest()


def choose(
    bundles: Sequence[str | Path], names: Sequence[str] | None, plan: Plan, breakdown: Sequence[int] = ()
) -> list[tuple[Bundle, Variant]]:
    """What `profile_bundle` would measure; only manifests are read.

    Raises BundleError for a bundle or variant that is not there, UserError for a bundle given twice and for a plan that a
    variant cannot be measured by.
    """
    refuse_twice("bundle", bundles)
    every = [(bundle, variant) for bundle in map(Bundle.open, bundles) for variant in bundle.variants]
    known = {variant.name for _, variant in every}
    for name in names or ():
        if name not in known:
            raise BundleError(one_of("variant", name, sorted(known)))
    chosen = [(bundle, variant) for bundle, variant in every if names is None or variant.name in names]
    for _, variant in chosen:
        check_plan(plan, breakdown, variant.config)
    return chosen


def with_breakdown(cell: Cell, opener: OpenSession, seed: int) -> Cell:
    """The decode cell with where the time goes, from a profiled run in a session of its own; other cells as they are."""
    if cell.kind != "decode":
        return cell
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        with opener(batch=cell.batch, capacity=cell.capacity, profile_to=Path(folder) / "profile") as session:
            prompts, tokens = random_tokens(session, cell.context, seed)
            session.prefill(prompts)
            for _ in range(BREAKDOWN_WARMUP + BREAKDOWN_STEPS):
                started = time.perf_counter()
                session.decode(tokens)
                seconds.append(time.perf_counter() - started)
                session.rewind(cell.context)
        files = list(Path(folder).glob("profile*"))
        if len(files) != 1:
            raise EngineError(
                f"backend {cell.backend} wrote {len(files)} profiles of variant {cell.subject.variant!r}, not one"
            )
        if cell.backend.startswith("tensorrt"):
            classes, layers = read_layers(files[0], seconds[-BREAKDOWN_STEPS:])
            return dataclasses.replace(cell, breakdown=classes, layers=layers)
        return dataclasses.replace(cell, breakdown=read_breakdown(files[0], BREAKDOWN_STEPS))
