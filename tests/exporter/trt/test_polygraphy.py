"""Polygraphy, NVIDIA's own loaders, as the judge of what a builder is told and of the plan it makes."""

from __future__ import annotations

import dataclasses

import pytest

from exporter.engines.tensorrt.api import Api, Messages
from exporter.engines.tensorrt.build import build, source_of
from exporter.engines.tensorrt.compile import config_of, profiles_of
from exporter.engines.tensorrt.network import parse
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.plan import BuildOptions, recipe_of

TARGETS = ("sm86", "sm89")
OPTIONS = BuildOptions(targets=TARGETS, batch=2, capacity=32, prefill=8)


@pytest.fixture
def polygraphy(monkeypatch, api):
    """Its module of loaders, over TensorRT for RTX, and the class that makes configurations."""
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")  # read where it is imported first
    from polygraphy.backend import trt
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    return trt, CreateConfigRTX


def profiles(trt, batch: int = 2, prefill: int = 8):
    """Prefill, tuned for its longest, and decode, of the two inputs whose length is open."""
    made = []
    for least, best, most in ((1, prefill, prefill), (1, 1, 1)):
        profile = trt.Profile()
        for name in ("input_ids", "position_ids"):
            profile.add(name, (batch, least), (batch, best), (batch, most))
        made.append(profile)
    return made


def told(config) -> dict[str, object]:
    return {
        "flags": config.flags,
        "level": config.builder_optimization_level,
        "verbosity": config.profiling_verbosity,
        "profiles": config.num_optimization_profiles,
        "chips": [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)],
    }


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({}, {}),
        ({"optimisation": 1}, {"builder_optimization_level": 1}),
        ({"workspace": 64}, {"memory_pool_limits": "WORKSPACE"}),
    ],
    ids=["plain", "optimisation", "workspace"],
)
def test_the_builder_is_told_what_polygraphy_tells_it(api: Api, attention, polygraphy, changes, theirs):
    trt, create = polygraphy
    (part,) = parts_of(attention.variants[0])
    recipe = recipe_of(attention, part, api, TARGETS, dataclasses.replace(OPTIONS, **changes))
    source, _ = source_of(attention, part, recipe)
    parsed = parse(api, source, Messages())
    ours = config_of(parsed, part, recipe, profiles_of(part, recipe))
    if "memory_pool_limits" in theirs:
        theirs = {"memory_pool_limits": {api.trt.MemoryPoolType.WORKSPACE: 64 << 20}}
    detailed = api.trt.ProfilingVerbosity.DETAILED
    creator = create(profiles=profiles(trt), compute_capabilities=[(8, 6), (8, 9)], profiling_verbosity=detailed, **theirs)
    wanted = creator(parsed.builder, parsed.definition)
    assert told(ours) == told(wanted)
    pool = api.trt.MemoryPoolType.WORKSPACE
    assert ours.get_memory_pool_limit(pool) == wanted.get_memory_pool_limit(pool)


def test_its_parser_and_builder_make_the_same_plan(api: Api, attention, polygraphy):
    """To the byte in size; what differs is a time stamp, as between any two builds."""
    trt, create = polygraphy
    (built,) = build(attention, OPTIONS)
    (part,) = parts_of(attention.variants[0])
    source, _ = source_of(attention, part, built.record.recipe)
    network = trt.network_from_onnx_bytes(source.model.SerializeToString())
    detailed = api.trt.ProfilingVerbosity.DETAILED
    config = create(profiles=profiles(trt), compute_capabilities=[(8, 6), (8, 9)], profiling_verbosity=detailed)
    assert trt.engine_bytes_from_network(network, config).nbytes == built.record.bytes
