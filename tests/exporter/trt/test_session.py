"""Which engine a session takes, and what it says where there is none that fits, or no GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import tiny
import torch

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.cli import _run
from exporter.engines import open_session
from exporter.engines.tensorrt import loaded, record
from exporter.engines.tensorrt.api import Api, Messages, logger
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.loaded import Loaded, read_plan
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.engines.tensorrt.record import EngineRecord, Wanted, choose
from exporter.errors import EngineError
from exporter.export import ExportOptions, export

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
    ("compatible", "version", "device", "fits"),
    [
        ((), "11.4.0", "sm80", True),
        ((), "11.5.0", "sm80", False),
        (("version",), "11.5.0", "sm80", True),
        (("version",), "12.0", "sm80", True),
        (("version",), "11.10.0", "sm80", True),  # a later one: 10 is more than 4
        (("version",), "11.3.9", "sm80", False),  # earlier than what built it
        (("version",), "11.4.0", "sm90", False),
        (("hardware",), "11.4.0", "sm90", True),
        (("hardware",), "11.4.0", "sm120", True),
        (("hardware",), "11.4.0", "sm75", False),
        (("hardware",), "11.5.0", "sm90", False),
        (("hardware", "version"), "11.5.0", "sm90", True),
    ],
)
def test_compatible_engines_run_on_later_versions_and_chips(built, compatible, version, device, fits):
    bundle, folder, engine = built
    changes = {"backend": "tensorrt", "version": "11.4.0", "targets": ("sm80",), "compatible": compatible}
    engine = dataclasses.replace(engine, recipe=dataclasses.replace(engine.recipe, **changes))
    record.write(folder, (engine,))
    asked = (bundle, bundle.variants[0], Wanted("tensorrt", version, 2, 20), device)
    if fits:
        assert choose(*asked) == (folder, engine)
    else:
        with pytest.raises(EngineError, match=r"engines built by 11\.4\.0, here is|engines for sm80, this GPU is"):
            choose(*asked)


class Refit:
    """What a Refitter and its parser are given."""

    def __init__(self, works: bool = True) -> None:
        self.works, self.given, self.done = works, dict[str, int](), False
        trt = SimpleNamespace(__name__="tensorrt", Refitter=lambda *_: self, OnnxParserRefitter=lambda *_: self)
        self.api = Api("tensorrt", trt, "11.4")

    def load_model_proto(self, graph: bytes, _path: str) -> bool:
        self.graph = graph
        return True

    def load_initializer(self, name: str, _address: int, size: int) -> bool:
        self.given[name] = size
        return True

    def refit_model_proto(self) -> bool:
        return self.works

    def refit_cuda_engine(self) -> bool:
        self.done = True
        return True


@pytest.fixture
def exported(tmp_path) -> Bundle:
    """Its weights lie in files, as export writes them."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    return export(
        open_source(tmp_path / "config.json"), tmp_path / "b", ExportOptions((2,), patterns=("attention",), dtype="fp16")
    )


def test_an_engine_without_weights_gets_the_bundles(exported):
    (made,) = build(exported, dataclasses.replace(OPTIONS, capacity=16, prefill=8))
    recipe, (part,) = dataclasses.replace(made.record.recipe, strip=True), parts_of(exported.variants[0])
    refit = Refit()
    loaded.refit(refit.api, None, None, Messages(), exported, part, recipe)
    assert refit.done
    kept = {tensor.name: tensor for tensor in onnx.load_from_string(refit.graph).graph.initializer}
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.v_proj.weight"} <= refit.given.keys()
    assert refit.given["model.layers.1.self_attn.v_proj.weight"] == 2 * 32 * 64
    assert all(name in kept for name in refit.given)
    with pytest.raises(EngineError, match="the weights of variant g2 do not go into its engine: it gave no reason"):
        loaded.refit(Refit(works=False).api, None, None, Messages(), exported, part, recipe)
    path = exported.path / exported.variants[0].weights[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match=r"has the SHA-256 \w{12}…, the engine was built from \w{12}…"):
        loaded.refit(refit.api, None, None, Messages(), exported, part, recipe)


class Runtime:
    """Loads one plan as an engine of these aliases, or not at all."""

    def __init__(self, aliases: dict[str, str] | None) -> None:
        self.aliases, self.engine_host_code_allowed = aliases, False

    def deserialize_cuda_engine(self, _plan: bytes) -> SimpleNamespace | None:
        aliases = self.aliases
        return None if aliases is None else SimpleNamespace(get_aliased_input_tensor=lambda name: aliases.get(name, ""))


def load_with(runtime: Runtime, real: Api, built, **recipe) -> Loaded:
    bundle, folder, engine = built
    engine = dataclasses.replace(engine, recipe=dataclasses.replace(engine.recipe, **recipe))
    trt = SimpleNamespace(__name__="tensorrt_rtx", Runtime=lambda _log: runtime, ILogger=real.trt.ILogger)
    return Loaded(Api("tensorrt-rtx", trt, "1.7"), bundle, folder, engine, parts_of(bundle.variants[0])[0])


def test_a_plan_that_does_not_load_or_has_other_aliases_is_refused(api, built):
    pairs = {b.name: b.alias for b in built[2].bindings if b.alias}
    assert len(pairs) == 4
    assert not load_with(Runtime(pairs), api, built).runtime.engine_host_code_allowed
    assert load_with(Runtime(pairs), api, built, compatible=("version",)).runtime.engine_host_code_allowed
    with pytest.raises(EngineError, match=r"tensorrt_rtx 1.7 does not load .*\.engine: it gave no reason"):
        load_with(Runtime(None), api, built)
    for name, other, told in (
        ("present.1.key", "", "nothing"),
        ("present.0.value", "past_key_values.0.key", "past_key_values.0.key"),
        ("logits", "past_key_values.0.key", "past_key_values.0.key"),
    ):
        words = rf"has {name} share the memory of {told}, planned {pairs.get(name)}"
        with pytest.raises(EngineError, match=words):
            load_with(Runtime({**pairs, name: other}), api, built)


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
        EngineError, match=rf"has {len(whole) - 1} bytes, {len(whole)} were built; it is damaged; build it again"
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


@pytest.mark.usefixtures("bare")
def test_run_refuses_in_one_line(exported, capsys):
    command = ["run", str(exported.path), "--backend", "tensorrt-rtx", "--tokens", "1", "--max-new-tokens", "2"]
    for built, words in ((False, "has no tensorrt-rtx engine of variant g2"), (True, "TensorRT engines run on an NVIDIA GPU")):
        if built:
            build(exported, dataclasses.replace(OPTIONS, batch=1))
        assert _run(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert _run([*command, "--engine-weights", "int4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has tensorrt-rtx engines with weights as exported, not int4; headpool build" in line
