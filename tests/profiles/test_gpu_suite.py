"""scripts/gpu_suite without a GPU: it runs to its end, its torch and ONNX Runtime steps run on the CPU, failures stay apart."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle import Bundle
from exporter.config import RopeConfig
from exporter.engines.torch_eager import TorchSession
from exporter.errors import EngineError
from exporter.models.decoder import Decoder
from profiles.bundles import subject_of
from profiles.compare import compare
from profiles.gpu import child, latency, tokens, wheels
from profiles.gpu import steps as table
from profiles.gpu.models import model
from profiles.gpu.place import Place
from profiles.gpu.steps import STEPS, Step, chosen
from profiles.gpu.suite import Suite, main
from profiles.gpu.yardstick import YardstickSession
from profiles.results import Bandwidth, Results

ROOT = Path(__file__).parents[2]


def step(name: str) -> Step:
    return next(step for step in STEPS if step.name == name)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """The bundle of `heads`, tiny, exported by the suite's own step."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "out").mkdir()
    place = Place(folder / "out", folder, "cpu", "tiny")
    latency.export_model(step("export.heads"), place)
    return place


def test_without_a_gpu_every_gpu_step_says_why_it_is_skipped(tmp_path):
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_suite"), str(tmp_path / "out"), "--work", str(tmp_path / "work")],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"gpu_suite: nothing was measured \(no GPU: .*\); --device cpu tries the suite\n$", done.stderr)
    assert f"{len(STEPS)} steps: 1 done, 0 failed, {len(STEPS) - 1} skipped; results are in" in done.stdout
    notes = json.loads((tmp_path / "out" / "steps.json").read_text())["steps"]
    assert [note["step"] for note in notes] == [step.name for step in STEPS]
    assert notes[0]["status"] == "done"
    assert notes[0]["detail"]["machine"]["cpu"]
    assert {note["status"] for note in notes[1:]} == {"skipped"}
    reasons = {note["step"]: note["reason"] for note in notes[1:]}
    assert reasons["latency.layers.torch.sdpa"].startswith("no GPU: ")
    assert reasons["export.layers"] == "nothing that would run its graphs can run here"
    assert reasons["report"] == "there are no results"


def test_tokens_of_every_backend_are_torchs(place):
    (place.work / "placement-heads-gqa_1.json").write_text("")  # an earlier run's profile, where --work was kept
    for backend, patterns in (("torch", 1), ("onnxruntime", 3)):
        rows = tokens.compare_tokens(step(f"tokens.heads.{backend}"), place)["rows"]
        found = [row for row in rows if "groups" in row]
        assert len(found) == 2 * patterns
        assert all(row["ok"] and row["same"] == row["of"] == tokens.STEPS + 1 for row in found)
    assert rows[-1] == {"off the device": {"gqa": {}, "attention": {}, "grouped": {}}}


def without_positions(x, cos, sin, real):
    return x


def of_other_heads(x, cos, sin, real):
    return real(x.roll(1, 2), cos, sin) if x.shape[2] > 1 else real(x, cos, sin)


def without_a_row(query, key, value, real, attn_mask=None, **rest):
    if attn_mask is None:  # a decode step
        key, value = key[:, :, 1:], value[:, :, 1:]
    return real(query, key, value, attn_mask=attn_mask, **rest)


def with_keys_of_other_rows(query, key, value, real, **rest):
    return real(query, key.roll(1, 2), value, **rest)


MISTAKES_OF_ATTENTION = [
    ("profiles.gpu.yardstick._rotate", without_positions),
    ("profiles.gpu.yardstick._rotate", of_other_heads),
    ("torch.nn.functional.scaled_dot_product_attention", without_a_row),
    ("torch.nn.functional.scaled_dot_product_attention", with_keys_of_other_rows),
]


@pytest.mark.parametrize(("name", "wrong"), MISTAKES_OF_ATTENTION, ids=[wrong.__name__ for _, wrong in MISTAKES_OF_ATTENTION])
def test_no_limit_hides_a_mistake(place, monkeypatch, name, wrong):
    real = pkgutil.resolve_name(name)
    compare_session = tokens._compare

    def compare_wrong(*given):
        with monkeypatch.context() as patch:
            patch.setattr(name, functools.partial(wrong, real=real))
            return compare_session(*given)

    monkeypatch.setattr(tokens, "_compare", compare_wrong)
    monkeypatch.setitem(tokens.LIMITS, "fp32", tokens.LIMITS["fp16"])
    with pytest.raises(EngineError, match=r"^g4.sdpa") as caught:
        tokens.compare_tokens(step("tokens.heads.torch"), place)
    assert not {"error", "Infinity"} & set(re.findall(r"\w+", str(caught.value)))  # it ran, and was off


def test_another_token_than_torchs_fails_the_step_and_is_named(place, monkeypatch):
    real = YardstickSession.decode

    def off(self, given):
        logits = real(self, given)
        if self.config.kv_heads[0] == 1:
            logits[:, 7] += 1
        return logits

    monkeypatch.setattr(YardstickSession, "decode", off)
    with pytest.raises(EngineError, match=r"^g1.sdpa of 2 variants are off or failed"):
        tokens.compare_tokens(step("tokens.heads.torch"), place)


def test_latency_of_each_backend_lies_in_files_that_compare_and_report_read(place, monkeypatch):
    monkeypatch.setitem(latency.SAMPLES, "tiny", 4)
    place.bundle("layers").symlink_to(place.bundle("heads"))  # of the same shape where it is tiny
    for name in ("torch.sdpa", "torch.sdpa-compiled", "onnxruntime.gqa", "onnxruntime.attention"):
        lines = latency.measure_latency(step(f"latency.layers.{name}"), place)["cells"]
        assert len(lines) == 4
        assert "× the floor" in lines[0]
    results = Results.load(place.out / "layers-onnxruntime.json")
    assert [(c.subject.pattern, c.context, c.subject.groups) for c in results.cells] == [
        (pattern, context, groups) for pattern in ("gqa", "attention") for context in (24, 8) for groups in (4, 1)
    ]
    assert [cell.cohort for cell in results.cells] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert results.bandwidth is not None
    for cell in results.cells:
        size = cell.subject.weight_bytes + cell.context * cell.subject.kv_bytes_per_token
        assert cell.floor == pytest.approx(size / results.bandwidth.best)
    assert len(latency.add_breakdowns(step("breakdown.layers.onnxruntime.gqa"), place)["cells"]) == 2
    for cell in Results.load(place.out / "layers-onnxruntime.json").cells:
        assert (cell.breakdown is not None) == (cell.subject.pattern == "gqa" and cell.context == 24)
    torch_results = Results.load(place.out / "layers-torch.json")
    assert {cell.subject.pattern for cell in torch_results.cells} == {"sdpa", "sdpa-compiled"}
    assert len(compare(torch_results, torch_results).pairs) == 8
    assert child.report(place) == {"pages": ["report-layers.html"]}
    assert "sdpa-compiled" in (place.out / "report-layers.html").read_text()


def test_the_yardstick_counts_the_bytes_of_a_bundle(place):
    bundle = Bundle.open(place.bundle("heads"))
    for variant in bundle.variants:
        counted = latency.yardstick_subject("m", variant.config, variant.dtype, "sdpa")
        wanted = subject_of(bundle, variant)
        assert (counted.weight_bytes, counted.kv_bytes_per_token) == (wanted.weight_bytes, wanted.kv_bytes_per_token)


def test_the_yardstick_is_the_model(place):
    """Chunked prefill, decoding and rewinding of two sequences, against the eager reference.

    Of logits up to 3: both sum in float32 in another order, which moves them by 1e-6.
    """
    checkpoint = model("heads", "tiny").open(place.work)
    reference = Decoder.from_weights(checkpoint.config, checkpoint.weights)
    prompts = list(np.random.default_rng(0).integers(0, 128, (2, 20)))
    with TorchSession(reference, 2, 64) as wanted, YardstickSession(reference, 2, 64) as found:
        for session in (wanted, found):
            session.prefill([prompt[:7] for prompt in prompts])
        for part in (slice(7, 9), slice(9, 20)):
            logits = [session.prefill([prompt[part] for prompt in prompts]).copy() for session in (wanted, found)]
            np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)
        for length in (20, 21, 15):
            for session in (wanted, found):
                session.rewind(min(length, int(session.lengths[0])))
            logits = [session.decode(np.array([3, 4])).copy() for session in (wanted, found)]
            np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(EngineError, match="prompts of one length only"):
            found.prefill([prompts[0][:2], prompts[1][:3]])


@pytest.mark.parametrize(
    "changes", [{"qk_norm": True}, {"rope": RopeConfig("none")}, {"rope": RopeConfig(fraction=0.5)}], ids=str
)
def test_the_yardstick_refuses_what_it_would_leave_out(place, changes):
    config = dataclasses.replace(model("heads", "tiny").open(place.work).config, **changes)
    with pytest.raises(EngineError, match="the yardstick is for models that rotate whole heads"):
        YardstickSession(Decoder(config), 1, 8)


def fake(tmp_path, monkeypatch, code: str, minutes: float = 5.0) -> Suite:
    """A suite whose steps are this code: no torch, no time."""
    (tmp_path / "profiles" / "gpu").mkdir(parents=True)
    (tmp_path / "profiles" / "gpu" / "child.py").write_text("import json, os, sys, time\nname, result = sys.argv[1:3]\n" + code)
    monkeypatch.setattr("profiles.gpu.suite.ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    return Suite(tmp_path / "out", tmp_path, "cpu", "tiny", time.monotonic() + 60 * minutes)


CODE = """
if name == "tokens.heads.torch":
    os.abort()
if name == "export.heads":
    print("a word before the end", flush=True)
    time.sleep(60)
open(result, "w").write(json.dumps({"detail": {"missing": {"tensorrt": "no wheel"}}}))
"""


def test_a_step_that_hangs_or_crashes_costs_no_other(tmp_path, monkeypatch):
    suite = fake(tmp_path, monkeypatch, CODE)
    names = ("check", "export.heads", "tokens.heads.torch", "tokens.heads.onnxruntime", "tokens.heads.tensorrt", "report")
    limits = {"export.heads": 1}
    steps = tuple(Step(s.kind, limits.get(s.name, s.seconds), s.model, s.backend, s.pattern) for s in STEPS if s.name in names)
    environment = {**os.environ, "PYTHONPATH": ""}
    assert suite.run(steps, environment) == 2
    told = {note["step"]: note for note in json.loads((suite.out / "steps.json").read_text())["steps"]}
    assert told["export.heads"]["error"] == "it took more than 1 s and was stopped"
    assert told["export.heads"]["seconds"] < 20
    assert told["tokens.heads.torch"]["error"].startswith("it ended by signal SIGABRT; see ")
    assert told["tokens.heads.onnxruntime"]["reason"] == "export.heads was failed"
    assert told["tokens.heads.tensorrt"]["reason"] == "no wheel"
    assert told["report"]["reason"] == "there are no results"
    assert "a word before the end" in (suite.out / "log.txt").read_text()


def test_when_the_time_is_up_the_rest_is_skipped(tmp_path, monkeypatch):
    suite = fake(tmp_path, monkeypatch, "open(result, 'w').write('{}')", minutes=0)
    assert suite.run(STEPS[:3], dict(os.environ)) == 0
    assert [note["reason"] for note in suite.notes] == ["no time was left"] * 3


def test_steps_are_chosen_by_name_or_part_with_what_they_need():
    assert chosen(()) == STEPS
    assert [step.name for step in chosen(("smollm2.onnxruntime",))] == [
        "check",
        "export.smollm2",
        "tokens.smollm2.onnxruntime",
        "latency.smollm2.onnxruntime.gqa",
        "report",
    ]
    with pytest.raises(ValueError, match="step 'vulkan' is not one of check, "):
        chosen(("vulkan",))
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert {step.pattern for step in STEPS if step.kind == "latency"} <= {p for ps in table.PATTERNS.values() for p in ps}


MISTAKES = [
    ([], "name the folder for the results"),
    (["{out}/there"], "exists and is no empty folder"),
    (["{out}/new", "--steps", "x"], "step 'x' is not one of"),
    (["{out}/new", "--wheels", "{out}/none"], "is not a folder"),
    (["--pack", "{out}/there"], "exists; choose another name"),
    (["{out}/new", "--device", "gpu"], "invalid choice: 'gpu'"),
    (["--pack", "{out}/new", "--piece", "0"], "--piece 0 is not a whole number from 1"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, words):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main([argument.format(out=tmp_path) for argument in arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "new").exists()


def test_wheels_travel_in_pieces_and_are_joined(tmp_path):
    rng = np.random.default_rng(0)
    names = ("other-1.whl", "onnxruntime_gpu-1.31.1-cp312.whl", "gguf-0.19.0-py3.whl", "pydantic-2-py3.whl")
    sizes = dict(zip(names, (5, 5 * wheels.MIB + 17, 100, wheels.MIB), strict=True))
    whole, folder, together = tmp_path / "whole", tmp_path / "pack", tmp_path / "together"
    for path in (whole, folder, together):
        path.mkdir()
    contents = {name: rng.bytes(size) for name, size in sizes.items()}
    for name, content in contents.items():
        (whole / name).write_bytes(content)
    trips = wheels.cut(whole, folder, 2 * wheels.MIB)
    assert trips == len(list(folder.iterdir())) == 4
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["gguf-0.19.0-py3.whl", "pydantic-2-py3.whl"]
    for trip in folder.iterdir():
        assert sum(path.stat().st_size for path in trip.iterdir()) <= 2 * wheels.MIB
        for path in trip.iterdir():
            (together / path.name).write_bytes(path.read_bytes())
    joined = wheels.join(together, tmp_path)
    assert {path.name: path.read_bytes() for path in joined} == contents


IMPORTED = """
import pathlib, sys, tempfile
from importlib.metadata import packages_distributions
from profiles.gpu import child, latency, tokens
from profiles.gpu.place import Place
from profiles.gpu.steps import STEPS
steps, folder = {step.name: step for step in STEPS}, pathlib.Path(sys.argv[1])
(folder / "out").mkdir()
place = Place(folder / "out", folder, "cpu", "tiny")
child.check(place)
latency.export_model(steps["export.heads"], place)
tokens.compare_tokens(steps["tokens.heads.onnxruntime"], place)
latency.export_model(steps["export.smollm2"], place)
latency.export_model(steps["export.layers"], place)
for name in ("torch.sdpa", "onnxruntime.gqa"):
    latency.measure_latency(steps[f"latency.layers.{name}"], place)
child.report(place)
here = packages_distributions()
print("\\n" + " ".join({name for module in sys.modules for name in here.get(module.partition(".")[0], [])}))
"""
OF_TORCH = {
    "torch",
    "filelock",
    "typing-extensions",
    "setuptools",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
}
WHERE_THERE = {"dill", "charset-normalizer"}  # which torch and onnxscript use where they are


def test_the_wheels_are_all_that_the_suite_imports_beside_torchs_own(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORTED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {wheels.name_of(name) for name in done.stdout.splitlines()[-1].split()}
    assert {"onnxruntime", "scipy", "psutil", "gguf"} < imported
    brought = {wheels.name_of(wheel.requirement.partition("==")[0]) for wheel in wheels.WANTED}
    assert imported - brought - OF_TORCH - WHERE_THERE == {"headpool", "onnxruntime"}  # which onnxruntime-gpu is


def test_a_common_wheel_is_left_out_where_there_is_one(tmp_path):
    (tmp_path / "wheels").mkdir()
    for name in ("numpy-1-cp312.whl", "onnx_ir-1-py3-none-any.whl"):  # both are there; the second is ours to choose
        (tmp_path / "wheels" / name).write_bytes(b"no zip")
    record = wheels.install(tmp_path / "wheels", tmp_path / "site", tmp_path / "log.txt")
    assert record["error"] == "not installed: onnx_ir-1-py3-none-any.whl"


def test_a_damaged_wheel_is_named_and_costs_no_other(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1-py3-none-any.whl").write_bytes(b"no zip")
    record = wheels.install(tmp_path / "wheels", tmp_path / "site", tmp_path / "log.txt")
    assert record["status"] == "failed"
    assert record["error"] == "not installed: broken-1-py3-none-any.whl"


def test_a_wheel_that_lacks_its_first_piece_is_named(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / f"scipy-1-py3-none-any.whl{wheels.PART}01").write_bytes(b"the end")
    record = wheels.install(tmp_path / "wheels", tmp_path / "site", tmp_path / "log.txt")
    assert record["error"] == "not installed: scipy-1-py3-none-any.whl"


def test_results_of_steps_add_up_at_one_floor(tmp_path, factory):
    place = Place(tmp_path, tmp_path, "cuda", "full")
    cell = factory.cell(factory.subject(4), provider="NVIDIA H200", floor=None)
    place.add("layers", "torch", [cell], Bandwidth(0, 8, (1e12,)))
    results = place.add("layers", "torch", [factory.cell(factory.subject(2))], Bandwidth(0, 8, (4e12, 3e12)))
    assert results.bandwidth == Bandwidth(0, 8, (1e12, 4e12, 3e12))
    subject = cell.subject
    assert results.cells[0].floor == (subject.weight_bytes + 1024 * subject.kv_bytes_per_token) / 4e12
    assert [cell.cohort for cell in results.cells] == [0, 1]
    assert Results.load(place.results("layers", "torch")) == results
