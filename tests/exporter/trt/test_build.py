"""Engines built on a machine without a GPU: what is written, kept, taken up again, refused, and left behind by a failure."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import tiny

from exporter.bundle import Bundle
from exporter.cli import _run
from exporter.engines import open_session
from exporter.engines.tensorrt import build as stage
from exporter.engines.tensorrt import compile as compiling
from exporter.engines.tensorrt import plan as planning
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.errors import BundleError, EngineError, GraphError, UserError

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
    assert engine.network["cache_updates"] == 4
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
    assert network["decomposable_attention"] == (2 if fused and dtype == "fp32" else 0)
    assert network["fused_attention"] == (2 if fused and dtype != "fp32" else 0)


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


REFUSALS = [
    ({"capacity": 401}, "capacity 401 is not a whole number from 1 to 400, the model's context"),
    ({"prefill": 33}, "prefill 33 is not a whole number from 1 to 32, the capacity"),
    ({"batch": 0}, "batch 0 is not a whole number from 1 to 65536"),
    ({"optimisation": 6}, "optimisation level 6 is not a whole number from 0 to 5"),
    ({"workspace": 0}, "workspace 0 MiB is not a whole number from 1"),
    ({"targets": ("sm90",)}, "target 'sm90' is not one of sm75, sm80, sm86, sm89, sm120, sm121, here"),
    ({"targets": ("sm89", "sm89")}, "targets sm89, sm89: name each once, and here alone"),
    ({"targets": ("here", "sm89")}, "targets here, sm89: name each once, and here alone"),
    ({"targets": ("here",)}, "TensorRT engines run on an NVIDIA GPU: "),
    ({"backend": "tensorrt"}, "backend tensorrt needs tensorrt, which is not installed: pip install"),
    ({"backend": "openvino"}, "backend 'openvino' is not one of tensorrt, tensorrt-rtx"),
    ({"compatible": ("version",)}, "--compatible is of backend tensorrt"),
    (
        {"strip": True},
        "builds an engine without weights on the GPU it is for; leave --strip out, or build there with --target here",
    ),
    ({"quantize": "fp8"}, "sm86 lacks fp8, which starts with sm89; leave out of --target"),
    ({"variants": ("x",)}, "variant 'x' is not one of v"),
]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("changes", "words"), REFUSALS, ids=[str(changes) for changes, _ in REFUSALS])
def test_what_cannot_be_is_refused_before_anything_is_built(attention, changes, words):
    with pytest.raises((EngineError, BundleError)) as caught:
        build(attention, dataclasses.replace(OPTIONS, **changes))
    assert words in str(caught.value)
    assert not (attention.path / "engines").exists()


def test_a_gpu_that_the_library_does_not_name_is_left_to_its_builder(attention, monkeypatch):
    """sm90 has no name in TensorRT for RTX; where it is the GPU here, the builder is asked for "the current one"."""
    monkeypatch.setattr("exporter.engines.tensorrt.device.compute_capability", lambda: "sm90")
    with pytest.raises(EngineError, match=r"did not build|takes no profile"):
        build(attention, dataclasses.replace(OPTIONS, targets=("here",)))
    assert not list(attention.path.rglob("*.engine"))


def test_bf16_is_refused_for_a_chip_without_it(decoder, tmp_path):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="bf16")
    with pytest.raises(EngineError, match=r"variant v is bf16, and sm75 lacks bf16; leave sm75 out, or export it in fp16"):
        build(bundle, dataclasses.replace(OPTIONS, targets=("sm75", "sm89")))


def test_fp32_is_refused_for_a_chip_without_its_products(decoder, tmp_path):
    with pytest.raises(EngineError, match=r"variant v is fp32, and sm75 lacks products of fp32; leave sm75 out, or export"):
        build(tiny.bundle(tmp_path, decoder, "grouped"), dataclasses.replace(OPTIONS, targets=("sm75", "sm89")))
    assert not (tmp_path / "engines").exists()


def test_what_cannot_become_an_engine_costs_the_others_nothing(attention, decoder):
    """Without --variant; by name it is refused."""
    other = tiny.bundle(attention.path, decoder, "gqa", dtype="fp16").variants[0]
    both = Bundle(attention.path, (dataclasses.replace(other, name="w"), *attention.variants))
    assert [item.record.variant for item in build(both, OPTIONS)] == ["v"]
    with pytest.raises(BundleError, match=r"variant w \(gqa, static cache\) cannot become an engine"):
        build(both, dataclasses.replace(OPTIONS, variants=("v", "w")))
    with pytest.raises(EngineError, match=r"variant w \(gqa, static cache\) cannot become an engine"):
        open_session(both, "w", backend="tensorrt-rtx")


def test_what_fails_before_the_builder_leaves_nothing(attention):
    path = attention.path / attention.variants[0].graph
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"is not an ONNX graph: .*; export the bundle again$"):
        build(attention, OPTIONS)
    assert not (attention.path / "engines").exists()


def test_inspect_tells_what_a_look_at_a_plan_tells(exported, capsys):
    (built,) = build(Bundle.open(exported), BuildOptions(targets=("sm80",), variants=("g4.attention",)))
    path = built.folder / built.record.file
    for change, words in (
        (lambda: path.write_bytes(path.read_bytes()[:-1]), "bytes were built; it is damaged; build it again"),
        (path.unlink, "is missing, engine.json names it; build it again"),
    ):
        assert _run(["inspect", str(exported)]) == 0
        assert words not in capsys.readouterr().out
        change()
        assert _run(["inspect", str(exported)]) == 0
        assert words.replace("bytes were", f"{built.record.bytes} were") in capsys.readouterr().out


def test_heads_that_no_kernel_takes_are_refused(tmp_path, attention):
    variant = attention.variants[0]
    small = dataclasses.replace(variant, config=dataclasses.replace(variant.config, head_dim=12))
    with pytest.raises(BundleError, match=r"heads of 12 channels; .*--pattern grouped"):
        build(Bundle(attention.path, (small,)), OPTIONS)


@pytest.mark.parametrize(("pattern", "cache"), [("gqa", "static"), ("attention", "concat"), ("repeat", "concat")])
def test_a_bundle_without_a_static_cache_graph_is_refused(decoder, tmp_path, pattern, cache):
    bundle = tiny.bundle(tmp_path, decoder, pattern, cache=cache)
    with pytest.raises(BundleError, match=rf"v \({pattern}, {cache} cache\) cannot become an engine; .*--pattern attention"):
        build(bundle, OPTIONS)


def test_a_damaged_engine_json_is_refused(attention):
    (built,) = build(attention, OPTIONS)
    (built.folder / "engine.json").write_text('{"schema": 1, "engines": [{}]}')
    with pytest.raises(BundleError, match=r"engine.json cannot be read: engines\[0\] lacks variant"):
        build(attention, OPTIONS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of three graphs with its weights in files, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["export", str(folder / "config.json"), str(folder / "bundle"), "--groups", "4,1", "--dtype", "fp16"]
    assert _run([*arguments, "--pattern", "attention,grouped,gqa"]) == 0
    return folder / "bundle"


CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def test_the_command_builds_every_graph_that_fits(exported, capsys):
    assert _run(["build", str(exported), "--target", "sm89,sm120", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [f"model.{group}.{pattern}.engine" for group in ("g4", "g1") for pattern in ("attention", "grouped")]
    assert [engine["file"] for engine in report["engines"]] == names
    assert [engine["network"]["heads"] for engine in report["engines"]] == ["4:4", "4:4", "4:1", "4:1"]
    assert all(engine["recipe"]["capacity"] == 128 for engine in report["engines"])
    assert _run(["build", str(exported), "--target", "sm120,sm89"]) == 0
    assert capsys.readouterr().out.count("unchanged") == 4
    assert _run(["inspect", str(exported)]) == 0
    out = capsys.readouterr().out
    assert "engines/tensorrt-rtx-sm89-sm120/model.g1.attention.engine" in out
    assert "verified as it was built: 2 fused attention layers, 4 caches in place, heads 4:1" in out


def test_damaged_weights_are_refused(exported, tmp_path):
    bundle = Bundle.open(exported)
    broken = tmp_path / "bundle"
    broken.mkdir()
    for path in exported.iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    shared = broken / bundle.variants[0].weights[-1]
    shared.write_bytes(shared.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"ends inside weight .*; it is damaged, export the bundle again"):
        build(Bundle.open(broken), dataclasses.replace(OPTIONS, batch=1))


def test_a_graph_that_is_no_onnx_is_refused(attention):
    (attention.path / attention.variants[0].graph).write_bytes(b"not protobuf")
    with pytest.raises(BundleError, match=r"is not an ONNX graph"):
        build(attention, OPTIONS)


def test_a_mistake_is_one_line_and_exit_code_2(exported):
    command = [sys.executable, "-m", "exporter", "build", str(exported), "--variant", "g4.gqa"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "g4.gqa (gqa, static cache) cannot become an engine" in line


def test_building_imports_neither_torch_nor_transformers(exported):
    """Their memory would count on top of the builder's."""
    code = (
        "import sys; from exporter.cli import _run; "
        f"assert _run(['build', {str(exported)!r}, '--target', 'sm86', '--variant', 'g4.attention']) == 0; "
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
