"""Engines built on a machine without a GPU: what is written, kept, taken up again, and left behind by a failure."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from types import SimpleNamespace

import onnx
import pytest
import tiny

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.engines.tensorrt import build as stage
from exporter.engines.tensorrt import compile as compiling
from exporter.engines.tensorrt import plan as planning
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.errors import BundleError, EngineError, GraphError, UserError
from exporter.export import ExportOptions, export

OPTIONS = BuildOptions(targets=("sm86", "sm89"), batch=2, capacity=32, prefill=8)
FOLDER = "tensorrt-rtx-sm86-sm89"


def partial_files(bundle: Bundle) -> list[str]:
    return [path.name for path in bundle.path.rglob("*") if "partial" in path.name]


def test_an_engine_is_built_and_recorded(attention):
    seen: list[tuple[str, int, int]] = []
    (built,) = build(attention, OPTIONS, lambda *args: seen.append(args))
    folder = attention.path / "engines" / FOLDER
    engine = built.record
    assert built.fresh
    assert built.folder == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(["engine.json", engine.file, engine.log])
    plan = (folder / engine.file).read_bytes()
    assert len(plan) == engine.bytes
    assert record.sha256(folder / engine.file) == engine.sha256
    assert record.read(folder) == (engine,)
    assert engine.file == "attention.static.fp16.last.b2.s32.engine"
    assert [dataclasses.astuple(profile) for profile in engine.profiles] == [("prefill", 1, 8, 8), ("decode", 1, 1, 1)]
    assert engine.recipe.targets == ("sm86", "sm89")
    assert (engine.recipe.module, engine.recipe.version) == ("tensorrt_rtx", stage.load("tensorrt-rtx").version)
    by_name = {binding.name: binding for binding in engine.bindings}
    assert by_name["input_ids"].shape == (2, -1)
    assert by_name["past_key_values.1.value"].shape == (2, 3, 32, 16)
    assert by_name["present.1.value"].alias == "past_key_values.1.value"
    assert engine.network.cache_updates == 4
    assert engine.seconds > 0
    assert "[info]" in (folder / engine.log).read_text()
    parts = [done for what, done, _ in seen if what == "building v"]
    assert parts == sorted(parts)
    assert parts[-1] == 1000
    assert seen[-1] == ("engines", 1, 1)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_every_dtype_and_pattern_builds(decoder, tmp_path, pattern, dtype):
    """TensorRT has no fused kernel of several fp32 queries: there attention is marked as one that may be taken apart."""
    (built,) = build(tiny.bundle(tmp_path, decoder, pattern, dtype=dtype), OPTIONS)
    assert built.record.intact(built.folder)
    network, fused = built.record.network, pattern == "attention"
    assert network.decomposable_attention == (2 if fused and dtype == "fp32" else 0)
    assert network.fused_attention == (2 if fused and dtype != "fp32" else 0)


@pytest.mark.parametrize("targets", [("sm75",), ("sm80",), ("sm121",), ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")])
def test_every_chip_is_built_for(attention, targets):
    (built,) = build(attention, dataclasses.replace(OPTIONS, targets=targets))
    assert built.record.recipe.targets == targets


def test_what_a_killed_build_left_is_removed_and_a_second_one_waits_for_none(attention):
    folder = attention.path / "engines" / FOLDER
    folder.mkdir(parents=True)
    (folder / ".v.engine.1234.partial").write_bytes(b"half of it")
    refused: list[str] = []

    def second(what: str, _done: int, _total: int) -> None:
        if what != "engines" and not refused:
            with pytest.raises(UserError, match="is in use: another call is at work there") as caught:
                build(attention, OPTIONS)
            refused.append(str(caught.value))

    assert build(attention, OPTIONS, second)[0].fresh
    assert refused
    assert partial_files(attention) == []


def test_a_refused_build_leaves_the_first_ones_empty_folder(attention, monkeypatch):
    """The first is still reading: nothing of it lies there yet."""
    prepare = stage.prepare

    def meanwhile(*given):
        with pytest.raises(UserError, match="is in use"):
            build(attention, OPTIONS)
        monkeypatch.setattr(stage, "prepare", prepare)
        return prepare(*given)

    monkeypatch.setattr(stage, "prepare", meanwhile)
    (built,) = build(attention, OPTIONS)
    assert built.record.intact(built.folder)


class Config:
    """A builder's configuration that takes timing caches as full TensorRT does: `None` of bytes that are none."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return data if data in (b"", b"times") else None

    def set_timing_cache(self, cache: bytes, _ignore: bool) -> bool:
        self.taken.append(cache)
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"times")


@pytest.mark.parametrize(("kept", "taken"), [(None, b""), (b"times", b"times"), (b"damaged", b"")])
def test_timings_are_kept_for_the_next_build(tmp_path, kept, taken):
    if kept is not None:
        (tmp_path / "timing.cache").write_bytes(kept)
    config, parsed = Config(), SimpleNamespace(api=SimpleNamespace(rtx=False))
    with compiling._timing_cache(parsed, config, tmp_path):
        assert config.taken == [taken]
    assert (tmp_path / "timing.cache").read_bytes() == b"times"
    assert partial_files(Bundle(tmp_path, ())) == []


def test_what_is_unchanged_is_kept(attention):
    (first,) = build(attention, OPTIONS)
    path = first.folder / first.record.file
    written = path.stat().st_mtime_ns, (first.folder / "engine.json").stat().st_mtime_ns
    (again,) = build(attention, OPTIONS)
    assert not again.fresh
    assert (path.stat().st_mtime_ns, (first.folder / "engine.json").stat().st_mtime_ns) == written
    assert again.record == first.record


@pytest.mark.parametrize("change", ["options", "graph", "plan", "missing", "code"])
def test_what_changed_is_built_again(attention, change, monkeypatch):
    (first,) = build(attention, OPTIONS)
    options, path = OPTIONS, first.folder / first.record.file
    if change == "options":
        options = dataclasses.replace(OPTIONS, capacity=64)
        assert record.read(first.folder) == (first.record,)
    elif change == "graph":
        graph = attention.path / attention.variants[0].graph
        graph.write_bytes(graph.read_bytes() + b"\x12\x00")  # an empty producer name: the same graph in other bytes
    elif change == "plan":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif change == "code":  # another headpool
        monkeypatch.setattr(planning, "_code", lambda: "0" * 64)
    else:
        path.unlink()
    (again,) = build(attention, options)
    assert again.fresh
    assert again.record.intact(again.folder)
    assert len(record.read(again.folder)) == (2 if change == "options" else 1)  # one of another capacity lies beside


def test_a_stopped_build_goes_on_where_it_was(attention, decoder, monkeypatch):
    """Of two variants the second fails; the next build keeps the first."""
    other = tiny.bundle(attention.path, decoder, "grouped", dtype="fp16").variants[0]
    both = Bundle(attention.path, (*attention.variants, dataclasses.replace(other, name="w")))
    compile_ = stage.compile_plan
    calls: list[int] = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise EngineError("no more")
        return compile_(*args)

    monkeypatch.setattr(stage, "compile_plan", failing)
    with pytest.raises(EngineError, match=r"no more \(log: .*grouped.static.fp16.last.b2.s32.log\)"):
        build(both, OPTIONS)
    assert partial_files(both) == []
    monkeypatch.undo()
    assert [item.fresh for item in build(both, OPTIONS)] == [False, True]
    assert [engine.variant for engine in record.read(both.path / "engines" / FOLDER)] == ["v", "w"]


def test_a_deviation_stops_the_build_and_leaves_its_log(decoder, tmp_path, monkeypatch):
    bundle = tiny.bundle(tmp_path, decoder, "grouped", dtype="fp16")
    wrong = Bundle(tmp_path, (dataclasses.replace(bundle.variants[0], pattern="attention"),))
    with pytest.raises(GraphError, match=r"layer 0 has 0 fused attention layers .*log: "):
        build(wrong, OPTIONS)
    assert [path.name for path in (tmp_path / "engines" / FOLDER).iterdir()] == ["grouped.static.fp16.last.b2.s32.log"]


def test_a_failed_build_gives_the_builders_reason(attention, monkeypatch):
    """Weights of fp8 on a chip that has none, past our own check."""
    monkeypatch.setattr(planning, "check_quantize", lambda *_: None)
    config = dataclasses.replace(attention.variants[0].config, intermediate_size=64)
    bundle = tiny.bundle(attention.path, tiny.Decoder(config).eval(), "attention", dtype="fp16")
    with pytest.raises(EngineError, match=r"did not build .*fp8_e4m3.*log:"):
        build(bundle, dataclasses.replace(OPTIONS, quantize="fp8"))
    assert not list(bundle.path.rglob("*.engine"))
    assert partial_files(bundle) == []


def test_an_interrupt_ends_the_build_and_leaves_nothing(attention):
    def interrupt(what: str, done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(attention, OPTIONS, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(attention.path.rglob("*.engine"))
    assert partial_files(attention) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(attention, monkeypatch):
    real = compiling.writer

    class Full:
        def write(self, _data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiling, "writer", lambda trt, _file: real(trt, Full()))
    with pytest.raises(UserError, match=r"\.engine cannot be written: No space left on device \(log: "):
        build(attention, OPTIONS)
    assert not list(attention.path.rglob("*.engine"))
    assert partial_files(attention) == []


def test_builds_outside_the_main_thread(attention):
    results: list[list[stage.Built]] = []
    thread = threading.Thread(target=lambda: results.append(build(attention, OPTIONS)))
    thread.start()
    thread.join()
    assert results[0][0].record.intact(results[0][0].folder)


def test_what_fails_before_the_builder_leaves_nothing(attention):
    path = attention.path / attention.variants[0].graph
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"is not an ONNX graph: .*; export the bundle again$"):
        build(attention, OPTIONS)
    assert not (attention.path / "engines").exists()


def test_a_damaged_engine_json_is_refused(attention):
    (built,) = build(attention, OPTIONS)
    (built.folder / "engine.json").write_text('{"schema": 1, "engines": [{}]}')
    with pytest.raises(BundleError, match=r"engine.json cannot be read: engines\[0\] lacks variant"):
        build(attention, OPTIONS)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ("profiles", [], "'attention.static.fp16.last.b2.s32.engine' has no profiles"),
        ("network", {"heads": "6:2"}, r"engines\[0\].network lacks layers, fused_attention"),
    ],
)
def test_an_engine_json_that_lacks_what_is_said_of_it_is_refused(attention, at, value, words):
    (built,) = build(attention, OPTIONS)
    path = built.folder / "engine.json"
    told = json.loads(path.read_text())
    told["engines"][0][at] = value
    path.write_text(json.dumps(told))
    with pytest.raises(BundleError, match=f"engine.json cannot be read: {words}.*; remove the folder and build again"):
        record.describe(attention.path)


def test_what_only_the_nodes_tell_stops_a_build(attention, monkeypatch):
    def refuse(*_: object) -> None:
        raise GraphError("nonpad_kv_seqlen")

    monkeypatch.setattr(stage, "check_nodes", refuse)
    with pytest.raises(GraphError, match="nonpad_kv_seqlen"):
        build(attention, OPTIONS)


DAMAGES = ["no location", "no length", "a length in words", "an offset below 0", "an empty file", "an empty graph"]


@pytest.mark.parametrize("change", DAMAGES)
def test_weights_that_lie_nowhere_are_refused(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    bundle = export(open_source(tmp_path / "config.json"), tmp_path / "b", ExportOptions(patterns=("attention",), dtype="fp16"))
    graph = bundle.path / bundle.variants[0].graph
    model = onnx.load(graph, load_external_data=False)
    place = next(tensor.external_data for tensor in model.graph.initializer if tensor.external_data)
    entries = {entry.key: entry for entry in place}
    if change.startswith("no "):
        place.remove(entries[change.removeprefix("no ")])
    elif change == "a length in words":
        entries["length"].value = "many"
    elif change == "an offset below 0":
        entries["offset"].value = "-8"
    elif change == "an empty file":
        (bundle.path / entries["location"].value).write_bytes(b"")
    graph.write_bytes(b"" if change == "an empty graph" else model.SerializeToString())
    words = r"(does not say where weight .* lies|is empty|has no nodes); it is damaged, export the bundle again$"
    with pytest.raises(BundleError, match=words):
        build(bundle, OPTIONS)


def test_a_graph_that_is_no_onnx_is_refused(attention):
    (attention.path / attention.variants[0].graph).write_bytes(b"not protobuf")
    with pytest.raises(BundleError, match=r"is not an ONNX graph"):
        build(attention, OPTIONS)
