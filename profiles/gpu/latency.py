"""Decode latency of one model on one backend, for every number of KV heads in turns, flushed after each context."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from exporter.bundle import Bundle, Variant
from exporter.config import ModelConfig
from exporter.engines import open_session
from exporter.engines.base import Session
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.export import ExportOptions, export
from exporter.files import replacing
from exporter.models.decoder import Decoder
from exporter.weights import TORCH_DTYPES
from profiles import stats
from profiles.bandwidth import BandwidthProbe
from profiles.bundles import subject_of, with_breakdown
from profiles.gpu.bandwidth import DeviceProbe
from profiles.gpu.models import model as model_of
from profiles.gpu.place import Place
from profiles.gpu.steps import PATTERNS, Step
from profiles.gpu.yardstick import YardstickSession, random_decoder
from profiles.measure import OpenSession, Plan, measure
from profiles.results import Cell, Results, Subject

PREFILL = 512
SAMPLES = {"full": 104, "tiny": 8}
COMPILERS = {"full": "inductor", "tiny": "eager"}  # eager: traced as a whole, and run as it is
SECONDS = {"full": 6.0, "tiny": None}  # of one cell's samples


def backend_name(backend: str, device: str) -> str:
    """The suite's word for a backend → headpool's."""
    return "onnxruntime-cuda" if backend == "onnxruntime" and device == "cuda" else backend


def export_model(step: Step, place: Place) -> dict[str, Any]:
    """The bundle of a model: every pattern that any backend takes, for every number of KV heads. One that is there is kept."""
    if place.bundle(step.model).is_dir():
        return {"kept": str(place.bundle(step.model))}
    chosen, patterns = model_of(step.model, place.shapes), PATTERNS["onnxruntime"]
    options = ExportOptions(chosen.groups, patterns=patterns, dtype=place.dtype)
    bundle = export(chosen.open(place.work), place.bundle(step.model), options)
    return {"source": bundle.source["name"], "variants": [variant.name for variant in bundle.variants]}


def measure_latency(step: Step, place: Place) -> dict[str, Any]:
    """p50 and its ratio to the floor of every cell, in words; the samples are in the results file."""
    chosen, lines = model_of(step.model, place.shapes), []
    probe: DeviceProbe | BandwidthProbe
    for context in chosen.contexts:
        probe = DeviceProbe() if place.device == "cuda" else BandwidthProbe(1, 1 << 26)
        plan = Plan(
            (context,),
            kinds=("decode",),
            samples=SAMPLES[place.shapes],
            seconds=SECONDS[place.shapes],
            memory=int(0.6 * torch.cuda.mem_get_info()[0]) if place.device == "cuda" else None,
        )
        probe()
        cells = measure(_subjects(step, place, plan.capacity_at(context)), plan, probe=probe)
        results = place.add(step.model, step.backend, cells, probe.result())
        del probe  # it holds gigabytes
        for cell in results.cells[-len(cells) :]:
            lines.append(_line(cell))
            print(lines[-1], flush=True)
    return {"cells": lines}


def add_breakdowns(step: Step, place: Place) -> dict[str, Any]:
    """Where the time of a step goes, of the cells at the longest context that `measure_latency` has found."""
    path, lines = place.results(step.model, step.backend), list[str]()
    results = Results.load(path)
    mine = [cell for cell in results.cells if cell.subject.pattern == step.pattern]
    openers = {subject.variant: opener for subject, opener in _subjects(step, place, max(cell.capacity for cell in mine))}
    cells = list(results.cells)
    for index, cell in enumerate(cells):
        if cell in mine and cell.context == max(each.context for each in mine):
            cells[index] = with_breakdown(cell, openers[cell.subject.variant], seed=0)
            parts = (cells[index].breakdown or {}).items()
            lines.append(f"G {cell.subject.groups_label}: {', '.join(f'{kind} {s * 1e6:.0f} µs' for kind, s in parts)}")
            print(lines[-1], flush=True)
    with replacing(path) as temporary:
        dataclasses.replace(results, cells=tuple(cells)).save(temporary)
    return {"cells": lines}


def _line(cell: Cell) -> str:
    p50, subject = stats.median(cell.samples), cell.subject
    ratio = f", {p50 / cell.floor:.2f} × the floor" if cell.floor else ""
    return f"G {subject.groups_label} {subject.pattern} at {cell.context} tokens: p50 {p50 * 1e6:.0f} µs{ratio}"


def _subjects(step: Step, place: Place, capacity: int) -> list[tuple[Subject, OpenSession]]:
    if step.backend == "torch":
        return _yardsticks(step, place)
    bundle = Bundle.open(place.bundle(step.model))
    variants = [variant for variant in bundle.variants if variant.pattern == step.pattern]
    if step.backend.startswith("tensorrt"):
        build_engines(bundle, variants, step.backend, capacity)
    backend = backend_name(step.backend, place.device)
    return [(subject_of(bundle, v), functools.partial(open_session, bundle, v, backend=backend)) for v in variants]


def build_engines(bundle: Bundle, variants: list[Variant], backend: str, capacity: int) -> None:
    """Engines for the GPU here with caches of `capacity` rows: a masked attention reads them all."""
    names, prefill = tuple(variant.name for variant in variants), min(PREFILL, capacity)
    for item in build(bundle, BuildOptions(backend, ("here",), names, capacity=capacity, prefill=prefill)):
        print(f"{item.record.file}: {item.record.bytes} bytes in {item.record.seconds} s", flush=True)


def _yardsticks(step: Step, place: Place) -> list[tuple[Subject, OpenSession]]:
    source = model_of(step.model, place.shapes)
    checkpoint = source.open(place.work)
    compiler = None if step.pattern == "sdpa" else COMPILERS[place.shapes]
    pairs: list[tuple[Subject, OpenSession]] = []
    for groups in source.groups:
        config = checkpoint.config.with_kv_heads(groups)
        subject = yardstick_subject(checkpoint.name, config, place.dtype, step.pattern)
        pairs.append((subject, functools.partial(_open_yardstick, config, place, compiler)))
    return pairs


def _open_yardstick(
    config: ModelConfig, place: Place, compiler: str | None, *, batch: int, capacity: int, profile_to: Path | None = None
) -> Session:
    assert profile_to is None, "only ONNX Runtime profiles itself"
    return YardstickSession(random_decoder(config, place.dtype, place.device), batch, capacity, compiler)


def yardstick_subject(name: str, config: ModelConfig, dtype: str, pattern: str) -> Subject:
    """The same bytes as a bundle's variant of this shape: an embedding that is not the head is not read."""
    with torch.device("meta"):
        values = sum(p.numel() for p in Decoder(config).parameters())
    unread = 0 if config.tied else config.vocab_size * config.hidden_size
    groups = config.kv_heads[0]
    return Subject(
        model=name,
        bundle="torch",
        bundle_hash="",
        variant=f"g{groups}.{pattern}",
        groups=groups,
        heads=config.num_heads,
        pattern=pattern,
        cache="static",
        dtype=dtype,
        weight_bytes=(values - unread) * TORCH_DTYPES[dtype].itemsize,
        kv_bytes_per_token=config.kv_bytes_per_token(dtype),
    )
