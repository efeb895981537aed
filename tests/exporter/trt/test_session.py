"""Which engine a session takes, and what it says where there is none that fits, or no GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from exporter.bundle import Bundle
from exporter.cli import _run
from exporter.engines import open_session
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.api import Messages, logger
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.loaded import read_plan
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.engines.tensorrt.record import EngineRecord, Wanted, choose
from exporter.errors import EngineError

OPTIONS = BuildOptions(targets=("sm86", "sm89"), batch=2, capacity=32, prefill=8)


@pytest.fixture
def built(attention) -> tuple[Bundle, Path, EngineRecord]:
    (one,) = build(attention, OPTIONS)
    return attention, one.folder, one.record


def wanted(engine: EngineRecord, **changes) -> Wanted:
    return dataclasses.replace(Wanted("tensorrt-rtx", engine.recipe.version, 2, 20), **changes)


def test_the_engine_that_fits_is_chosen(built):
    bundle, folder, engine = built
    assert choose(bundle, bundle.variants[0], wanted(engine), "sm89") == (folder, engine)
    assert choose(bundle, bundle.variants[0], wanted(engine, capacity=32)) == (folder, engine)


def test_plain_weights_and_the_smallest_capacity_come_first(built):
    bundle, folder, engine = built
    variant, recipe = bundle.variants[0], engine.recipe
    others = [
        dataclasses.replace(engine, file=f"{index}.engine", recipe=dataclasses.replace(recipe, **changes))
        for index, changes in enumerate([{"capacity": 64}, {"capacity": 24, "quantize": "int4"}])
    ]
    record.write(folder, (*others, engine))
    assert choose(bundle, variant, wanted(engine))[1] == engine
    assert choose(bundle, variant, wanted(engine, capacity=33))[1] == others[0]
    assert choose(bundle, variant, wanted(engine, quantize="int4"))[1] == others[1]
    with pytest.raises(EngineError, match=r"engines with weights as exported, int4, not fp8; headpool build"):
        choose(bundle, variant, wanted(engine, quantize="fp8"))


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        ({"version": "2.0"}, None, r"engines built by 1\.\S+, here is 2.0; headpool build"),
        ({}, "sm120", r"engines for sm86\+sm89, this GPU is sm120; headpool build .* --target here"),
        ({"batch": 3}, "sm89", r"engines for batch 2, this run has 3; headpool build .* --batch 3"),
        ({"capacity": 33}, "sm89", r"engines for 32 tokens a sequence, this run wants 33; .* --capacity 33"),
        ({"backend": "tensorrt"}, "sm89", r"has no tensorrt engine of variant v; make one: headpool build"),
    ],
)
def test_both_sides_are_named_where_none_fits(built, changes, device, words):
    bundle, _, engine = built
    with pytest.raises(EngineError, match=words):
        choose(bundle, bundle.variants[0], wanted(engine, **changes), device)


def test_a_damaged_plan_is_refused(built):
    _, folder, engine = built
    path = folder / engine.file
    whole = path.read_bytes()
    assert read_plan(folder, engine) == whole
    path.write_bytes(whole[:-1])
    with pytest.raises(
        EngineError, match=rf"has {len(whole) - 1} bytes, {len(whole)} were built; it is damaged, build it again"
    ):
        read_plan(folder, engine)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EngineError, match=r"has the SHA-256 \w{12}…, \w{12}… was built; it is damaged, build it again"):
        read_plan(folder, engine)
    path.unlink()
    with pytest.raises(EngineError, match=r"is missing, engine.json names it; build it again"):
        read_plan(folder, engine)


@pytest.mark.usefixtures("bare")
def test_without_a_gpu_there_is_one_line(built):
    bundle, _, _ = built
    with pytest.raises(EngineError, match=r"TensorRT engines run on an NVIDIA GPU: .*torch") as caught:
        open_session(bundle, backend="tensorrt-rtx", batch=2, capacity=32)
    assert "\n" not in str(caught.value)


def test_a_missing_engine_is_known_without_a_gpu(attention):
    with pytest.raises(EngineError, match=r"has no tensorrt-rtx engine of variant v; make one: headpool build"):
        open_session(attention, backend="tensorrt-rtx")


@pytest.mark.usefixtures("bare")
def test_a_missing_wheel_is_one_line(attention):
    with pytest.raises(
        EngineError, match=r"backend tensorrt needs tensorrt, which is not installed: pip install 'headpool\[tensorrt\]'"
    ):
        open_session(attention, backend="tensorrt")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a CUDA driver TensorRT loads the plan, so there is no refusal to look at"
)
def test_the_runtime_gives_its_reason_without_a_driver(built, api):
    """What our own check spares the user: the plan is whole, the module loads nothing."""
    _, folder, engine = built
    messages = Messages()
    runtime = api.trt.Runtime(logger(api.trt, messages))
    assert runtime.deserialize_cuda_engine(read_plan(folder, engine)) is None
    assert "cudaError" in messages.reason() or "CUDA" in messages.reason()


def test_run_refuses_in_one_line(tmp_path, capsys):
    assert _run(["run", str(tmp_path), "--backend", "tensorrt-rtx", "--tokens", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
