"""`headpool build` and `inspect` over an exported bundle of three graphs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny

from exporter.bundle import Bundle
from exporter.cli import _run
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.errors import BundleError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of three graphs with its weights in files, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.json").write_text(json.dumps(tiny.LLAMA))
    arguments = ["export", str(folder / "config.json"), str(folder / "bundle"), "--groups", "4,1", "--dtype", "fp16"]
    assert _run([*arguments, "--pattern", "attention,grouped,gqa"]) == 0
    return folder / "bundle"


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
        build(Bundle.open(broken), BuildOptions(targets=("sm86",), capacity=32, prefill=8))


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
