"""Damaged inputs and full disks: one line that names the file, exit code 2, nothing written, the inputs untouched."""

from __future__ import annotations

import io
import json
import resource
import shutil
import sys
from pathlib import Path

import hf
import pytest
from safetensors.torch import load_file, save_file

from exporter.cli import _run

COMMANDS_THAT_READ = [
    ["export", "PATH", "out"],
    ["export", "PATH", "out", "--weights", "link"],
    ["convert", "PATH", "out", "--groups", "1"],
    ["sweep", "PATH", "out", "--groups", "1", "--contexts", "4"],
    ["eval", "PATH", "--tokens", "30", "--window", "16"],
]


def damage(model: Path, how: str) -> str:
    """Damages the copy `model`; what the message must say."""
    weights, config = model / "model.safetensors", model / "config.json"
    data = weights.read_bytes()
    state = load_file(weights)
    settings = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(data[:-1000])
        return "model.safetensors is not a whole safetensors file: its tensors end at byte"
    if how == "empty":
        weights.write_bytes(b"")
        return "model.safetensors is not a whole safetensors file"
    if how == "corrupt header":
        weights.write_bytes(data[:8] + b"\xff" * 20 + data[28:])
        return "model.safetensors is not a whole safetensors file: its header is not JSON"
    if how == "gone":
        weights.unlink()
        return "has no model.safetensors and no model.safetensors.index.json"
    if how == "missing shard":
        hf.model("llama").save_pretrained(model, max_shard_size="40KB")
        weights.unlink(missing_ok=True)
        sorted(model.glob("model-*.safetensors"))[1].unlink()
        return "lacks 1 of "
    if how == "wrong shape":
        state["model.norm.weight"] = state["model.norm.weight"][:7].clone()
        save_file(state, weights)
        return "1 of the wrong shape (model.norm.weight is [7], its config says [48])"
    if how == "config contradicts":
        config.write_text(json.dumps({**settings, "num_key_value_heads": 3}))
        return "of the wrong shape (model.layers.0.self_attn.k_proj.weight is [16, 48], its config says [24, 48]"
    if how == "config broken":
        config.write_text("{")
        return "config.json is not JSON"
    if how == "unknown activation":
        config.write_text(json.dumps({**settings, "hidden_act": "quick_gelu"}))
        return "hidden_act 'quick_gelu' is not one of"
    assert how == "nan"
    state["model.norm.weight"][3] = float("nan")
    save_file(state, weights)
    return "NaN"


HOW = (
    *("truncated", "empty", "corrupt header", "gone", "missing shard", "wrong shape"),
    *("config contradicts", "config broken", "unknown activation", "nan"),
)


@pytest.mark.parametrize("how", HOW)
def test_damaged_checkpoints(how: str, refused, made: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made / "model", tmp_path / "damaged"))
    message = damage(model, how)
    for command in COMMANDS_THAT_READ:
        assert message in refused(*(model if word == "PATH" else word for word in command))
    if how != "nan":  # which is in the weights, and inspect reads none
        assert message in refused("inspect", model)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers(file: str, refused, made: Path, tmp_path: Path, monkeypatch) -> None:
    """Known before anything is written or measured, and not only when the bundle runs."""
    for place in ("exporter.export.converter", "exporter.convert.stage.convert_weights", "profiles.sweep.profile_bundle"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("the work has begun"))
    model = Path(shutil.copytree(made / "model", tmp_path / "damaged"))
    (model / file).write_bytes((made / "model" / "tokenizer.json").read_bytes()[:300])
    for command in COMMANDS_THAT_READ:
        said = refused(*(model if word == "PATH" else word for word in command))
        assert "damaged: tokenizer" in said
        assert file in said


def test_a_checkpoint_without_a_tokenizer(refused, headpool, made: Path, tmp_path: Path, monkeypatch) -> None:
    """Runs on token ids; what needs text says so before the work."""
    model = Path(shutil.copytree(made / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json")))
    sweep = ["sweep", model, "swept", "--groups", "2", "--contexts", "4", "--samples", "1", "--kinds", "decode"]
    with monkeypatch.context() as patch:
        patch.setattr("profiles.sweep.export", lambda *_, **__: pytest.fail("the work has begun"))
        assert refused(*sweep) == "model has no tokenizer.json, which quality is measured with; add it, or --quality-tokens 0"
    assert refused("eval", model, "--window", "16").startswith(f"{model} has no tokenizer.json; give a model that carries")
    for command in (["export", model, "out"], ["convert", model, "converted", "--groups", "1"]):
        code, _, err = headpool(*command)
        assert code == 0
        assert err == f"headpool: {command[2]} has no tokenizer.json, as its checkpoint has none: it takes token ids only\n"
    assert headpool("run", "out", "--tokens", "1,2", "--max-new-tokens", "2")[0] == 0
    assert headpool(*sweep, "--quality-tokens", "0")[0] == 0
    assert headpool("export", model / "config.json", "from-config")[::2] == (0, "")  # random weights speak no language


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"not a model at all" * 100])
def test_damaged_gguf(data: bytes, refused, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    for command in COMMANDS_THAT_READ:
        assert "model.gguf is not a whole GGUF file: " in refused(
            *("model.gguf" if word == "PATH" else word for word in command)
        )


@pytest.mark.parametrize("file", ["model.g2.onnx", "model.safetensors", "headpool.json", "tokenizer.json"])
def test_damaged_bundles(file: str, refused, made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made / "bundle", tmp_path / "damaged"))
    (bundle / file).write_bytes((bundle / file).read_bytes()[:100])
    for command in (["run", bundle, "--prompt", "a"], ["eval", bundle, "--tokens", "30", "--window", "16"]):
        refused(*command)
    if file != "tokenizer.json":  # which latency does not need
        refused("profile", bundle, "--contexts", "4", "--samples", "2")


@pytest.mark.parametrize("keep", [0, 1, 500, -2])
def test_damaged_results(keep: int, refused, made: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_bytes((made / "fast.json").read_bytes()[:keep])
    for command in (
        ["report", "cut.json"],
        ["compare", "cut.json", made / "fast.json"],
        ["compare", made / "fast.json", "cut.json"],
    ):
        assert "cut.json is not a results file: " in refused(*command)


@pytest.fixture
def file_size_limit():
    """Files may not grow past a number of bytes: a full disk that needs no disk. Lifted afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 100_000])
@pytest.mark.parametrize("command", ["export", "export --weights link", "convert --groups 1"])
def test_a_full_disk(command: str, limit: int, headpool, file_size_limit, snapshot, made: Path, tmp_path: Path, capfd) -> None:
    name, *words = command.split()
    before = snapshot(made)
    with capfd.disabled():  # the captured streams are files too
        out, err = io.StringIO(), io.StringIO()
        streams, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), out, err
        file_size_limit(limit)
        try:
            code = _run([name, str(made / "model"), str(tmp_path / "out"), *words])
        finally:
            file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            sys.stdout, sys.stderr = streams
    if code == 0:  # links write no weights
        assert (words, limit) == (["--weights", "link"], 100_000)
        return
    assert code == 2
    assert err.getvalue().startswith(f"headpool: {tmp_path}/out")
    assert "cannot be written: File too large" in err.getvalue()
    assert err.getvalue().count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert snapshot(made) == before
