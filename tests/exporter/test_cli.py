"""The real command line: results, and for every mistake one line, exit code 2, nothing left and the inputs untouched."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors.torch import load_file, save_file

from exporter.cli import COMMANDS, HELP, _run, app, options

spec = importlib.util.spec_from_file_location("exporter_hf", Path(__file__).with_name("hf.py"))
assert spec is not None
assert spec.loader is not None
hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf)

# A shell that starts the tests in the background has them ignore SIGINT, and so would what they start.
DEFAULT_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
HEADPOOL = [sys.executable, "-c", f"{DEFAULT_SIGINT}; from exporter.cli import main; main()"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """model/ (with a tokenizer), bundle/ (g2 and g1) and fast.json (latency of bundle's g2), read-only for the tests."""
    folder = tmp_path_factory.mktemp("made")
    hf.save("llama", folder).rename(folder / "model")
    hf.add_tokenizer(folder / "model")
    arguments = ["--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1"]
    for command in (
        ["export", folder / "model", folder / "bundle", "--groups", "2,1"],
        ["profile", folder / "bundle", "--variants", "g2", *arguments, "--out", folder / "fast.json"],
    ):
        assert _run([str(word) for word in command]) == 0
    return folder


@pytest.fixture
def headpool(capfd):
    """Runs a command line in this process; (exit code, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = _run([str(word) for word in arguments])
        return code, *capfd.readouterr()

    return run


def snapshot(*folders: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(headpool, made: Path, tmp_path: Path, monkeypatch):
    """The message of a command that must fail, run in an empty folder: one line, code 2, nothing written or changed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> str:
        before = snapshot(tmp_path, made)
        code, out, err = headpool(*arguments)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("headpool: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert snapshot(tmp_path, made) == before
        return err.removeprefix("headpool: ").rstrip("\n")

    return run


# What it says of itself


def test_constants_are_those_of_the_modules_that_define_them() -> None:
    from exporter.config import CACHE_FORMS, DTYPES
    from exporter.convert import METHODS
    from exporter.engines import BACKENDS
    from exporter.layout import STORAGES
    from graphs.patterns import PATTERNS
    from profiles.results import KINDS

    assert options.METHODS == METHODS
    assert tuple(PATTERNS) == options.PATTERNS
    assert options.CACHES == CACHE_FORMS
    assert options.DTYPES == DTYPES
    assert tuple(BACKENDS) == options.BACKENDS
    storage = next(p for p in app.get_command(None, "export").params if p.name == "storage")  # type: ignore[arg-type, union-attr]
    assert storage.type.choices == STORAGES  # type: ignore[attr-defined]
    from exporter.cli import measure

    assert measure.KINDS == KINDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, headpool) -> None:
    code, out, err = headpool(command, "--help")
    assert (code, err) == (0, "")
    assert "Examples:\n" in out
    assert f"headpool {command}" in out
    parameters = app.get_command(None, command).params  # type: ignore[arg-type, union-attr]
    assert all(
        parameter.help for parameter in parameters if isinstance(parameter, click.Option) and parameter.name != "help"
    ) or (command in ("run", "report"))


def test_help_and_version(headpool) -> None:
    code, out, _ = headpool("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in HELP)
    assert set(HELP) == set(COMMANDS)
    assert headpool()[0] == 0
    assert headpool("--version")[1].startswith("headpool")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, headpool) -> None:
    code, out, _ = headpool("completion", shell)
    assert code == 0
    assert "_HEADPOOL_COMPLETE" in out


def test_completion_completes() -> None:
    environment = {**os.environ, "_HEADPOOL_COMPLETE": "bash_complete", "COMP_WORDS": "headpool ex", "COMP_CWORD": "1"}
    done = subprocess.run(HEADPOOL, env=environment, capture_output=True, text=True, check=False)
    assert "plain,export" in done.stdout


# What it does


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (["doctor"], {"machine", "checks"}),
        (["inspect", "model"], {"kind", "path", "dtypes", "model"}),
        (["inspect", "model/config.json"], {"kind", "path", "dtypes", "model"}),
        (["inspect", "bundle"], {"kind", "path", "source", "tools", "variants"}),
        (["convert", "model", "OUT", "--groups", "1"], {"out", "conversion", "kv_heads"}),
        (["export", "model", "OUT"], {"out", "schema", "source", "tools", "variants"}),
        (["run", "bundle", "--prompt", "Hello", "--max-new-tokens", "3"], {"variant", "tokens", "texts", "prompt_tokens"}),
        (["eval", "bundle", "--tokens", "40", "--window", "16"], {"nats_per_token", "tokens", "seconds"}),
        (
            ["profile", "bundle", "--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1", "--out", "OUT"],
            {"out", "cells"},
        ),
        (["compare", "fast.json", "fast.json"], {"pairs", "only_a", "only_b"}),
        (["report", "fast.json", "--out", "OUT"], {"out"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_last_line_of_json_parses(
    command: list[str], keys: set[str], headpool, made: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(made)
    code, out, _ = headpool(*(str(tmp_path / "out") if word == "OUT" else word for word in command), "--json")
    assert code == 0
    assert keys <= set(json.loads(out.splitlines()[-1]))
    assert headpool(*(str(tmp_path / "again") if word == "OUT" else word for word in command))[0] == 0


def test_sweep_makes_a_bundle_results_and_a_page(headpool, made: Path, tmp_path: Path) -> None:
    arguments = ["--contexts", "4", "--samples", "2", "--prefill-samples", "1", "--quality-tokens", "40", "--threads", "1"]
    code, out, _ = headpool("sweep", made / "model", tmp_path / "out", "--groups", "2,1", *arguments, "--json")
    assert code == 0
    data = json.loads(out.splitlines()[-1])
    assert {(cell["groups"], cell["kind"]) for cell in data["cells"]} == {
        (g, k) for g in (2, 1) for k in ("decode", "prefill", "ttft")
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bundle", "report.html", "results.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_run_answers_as_the_torch_model_does(headpool, made: Path) -> None:
    """Greedy, streamed; against transformers' own generation."""
    import torch

    prompt = [5, 9, 33, 17]
    theirs = hf.model("llama").generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    expected = theirs[0, 4:].tolist()
    command = ["run", made / "bundle", "--max-new-tokens", "12"]
    code, out, err = headpool(*command, "--tokens", ",".join(map(str, prompt)))
    assert code == 0
    assert [int(word) for word in out.split()] == [token for token in expected if token != 2]
    assert err.startswith("first token after ")
    for capacity in (16, 100):
        data = json.loads(headpool(*command, "--tokens", "5,9,33,17", "--capacity", capacity, "--json")[1])
        assert data["tokens"] == [expected]


def test_run_prompts(headpool, made: Path, monkeypatch) -> None:
    command = ["run", made / "bundle", "--max-new-tokens", "6"]
    one = headpool(*command, "--prompt", "Hello")
    assert one[0] == 0
    two = headpool(*command, "--prompt", "Hello", "--prompt", "to all of you")
    assert two[1].splitlines()[0] == f"[0] {one[1].rstrip(chr(10))}"
    assert two[1].splitlines()[1].startswith("[1] ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert headpool(*command)[1] == one[1]
    chat = json.loads(headpool(*command, "--prompt", "Hello", "--chat", "--json")[1])
    assert chat["prompt_tokens"] == [len("Q Hello A ")]
    empty = json.loads(headpool(*command, "--prompt", "", "--json")[1])
    assert empty["prompt_tokens"] == [1]  # the beginning-of-text token alone


def test_seeds_make_samples_repeat(headpool, made: Path) -> None:
    command = ["run", made / "bundle", "--prompt", "Hello", "--max-new-tokens", "20", "--temperature", "1.5"]
    assert headpool(*command, "--seed", "3")[1] == headpool(*command, "--seed", "3")[1]
    assert headpool(*command, "--seed", "3")[1] != headpool(*command, "--seed", "4")[1]
    assert headpool(*command, "--top-k", "1")[1] == headpool(*command[:-2])[1]


def test_eval_of_a_model_against_itself(headpool, made: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4, "utf-8")
    words = ["--tokens", "120", "--window", "32", "--text", tmp_path / "text.txt", "--json"]
    model, bundle = made / "model", made / "bundle"
    results = [
        json.loads(headpool("eval", path, *words, "--reference", reference)[1])
        for path, reference in ((bundle, bundle), (bundle, model), (model, bundle))
    ]
    for data in results:
        assert data["same_token"] == 1.0
        assert abs(data["mean_kl"]) < 1e-6
        assert data["nats_per_token"] == pytest.approx(results[0]["nats_per_token"], abs=1e-4)
        assert (data["tokens"], data["compared_positions"]) == (119, 96)
    other = json.loads(headpool("eval", bundle, "--variant", "g1", *words, "--reference", bundle)[1])
    assert other["same_token"] < 1
    assert other["mean_kl"] > 0.01


def test_compare_fails_above_a_ratio(headpool, made: Path, tmp_path: Path) -> None:
    data = json.loads((made / "fast.json").read_text())
    for cell in data["cells"]:
        cell["samples"] = [10 * sample for sample in cell["samples"]]
    (tmp_path / "slow.json").write_text(json.dumps(data))
    assert headpool("compare", made / "fast.json", tmp_path / "slow.json")[0] == 0
    assert headpool("compare", made / "fast.json", tmp_path / "slow.json", "--fail-above", "1.5")[0] == 1
    assert headpool("compare", tmp_path / "slow.json", made / "fast.json", "--fail-above", "1.5")[0] == 0


# Mistakes

MODEL, BUNDLE, FAST = "{made}/model", "{made}/bundle", "{made}/fast.json"
RUN = ["run", BUNDLE, "--tokens", "1,2,3"]
PROFILE = ["profile", BUNDLE, "--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1"]
DIVIDE = "4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"
MISTAKES: list[tuple[list[str], str]] = [
    (["nonsense"], "No such command 'nonsense'. (see 'headpool --help')"),
    (["export", MODEL], "Missing argument 'OUT'. (see 'headpool export --help')"),
    (["export", MODEL, "out", "--nope"], "No such option '--nope'."),
    (["export", "nothing", "out"], "nothing does not exist; give a Hugging Face folder"),
    (["export", MODEL + "/model.safetensors", "out"], "is a weight file; give the folder that holds it"),
    (["export", MODEL, "out", "--groups", "4"], DIVIDE),
    (["convert", MODEL, "out", "--groups", "4"], DIVIDE),
    (["sweep", MODEL, "out", "--groups", "3,4"], DIVIDE),
    (["export", MODEL, "out", "--groups", "3,3"], "group counts 3, 3: name each once"),
    (["export", MODEL, "out", "--groups", "3,x"], "'3,x' is not a list of whole numbers such as 8,4,1"),
    (["export", MODEL, "out", "--groups", "0"], "'0' holds 0; the numbers start at 1"),
    (["convert", MODEL, "out", "--groups", "0"], "0 is not in the range x>=1"),
    (["export", MODEL, "out", "--pattern", "fused"], "'fused' is not one of repeat, grouped, attention, gqa"),
    (["export", MODEL, "out", "--dtype", "int8"], "'int8' is not one of 'fp32', 'fp16', 'bf16'"),
    (["export", MODEL, "out", "--cache", "ring"], "'ring' is not one of 'concat', 'static'"),
    (["export", MODEL, MODEL], "model exists; choose another name or remove it"),
    (["convert", MODEL, MODEL, "--groups", "1"], "model exists; choose another name or remove it"),
    (["sweep", MODEL, MODEL], "model exists; choose another name or remove it"),
    (["export", MODEL, "no/out"], "no/out cannot be written: "),
    (["convert", MODEL, "no/out", "--groups", "1"], "no/out cannot be written: "),
    (["sweep", MODEL, "no/out"], "no/out cannot be written: "),
    (["export", MODEL, MODEL + "/config.json/out"], "config.json is not a folder; make it first, or choose another place"),
    (["export", MODEL, "/proc/out"], "/proc/out cannot be written: "),
    (["run", "nothing", "--tokens", "1"], "nothing is not a bundle: it has no headpool.json; make one with 'headpool export'"),
    (["run", MODEL, "--tokens", "1"], "model is not a bundle: it has no headpool.json"),
    ([*RUN, "--variant", "g9"], "variant 'g9' is not one of g2, g1"),
    ([*RUN, "--backend", "tpu"], "'tpu' is not one of 'onnxruntime', 'onnxruntime-cuda'"),
    ([*RUN, "--prompt", "x"], "--tokens stands instead of --prompt and --chat; give one of them"),
    ([*RUN, "--capacity", "2"], "prompt 0 needs 3 cache rows, the capacity is 2; raise --capacity"),
    ([*RUN, "--capacity", "9"], "3 tokens and 128 new ones need 130 cache rows, the capacity is 9; raise --capacity or lower"),
    ([*RUN, "--max-new-tokens", "0"], "0 is not in the range x>=1"),
    ([*RUN, "--temperature", "nan"], "temperature nan is not a number from 0 (greedy) on"),
    ([*RUN, "--top-p", "nan"], "top-p nan is outside (0, 1]"),
    ([*RUN, "--top-k", "-1"], "-1 is not in the range x>=0"),
    ([*RUN, "--threads", "1000000000000"], "is not in the range 1<=x<=1024"),
    (["run", BUNDLE, "--tokens", "67"], "token id 67 is outside the vocabulary of 67"),
    (["run", BUNDLE, "--tokens", "9" * 30], f"token id {'9' * 30} is outside the vocabulary of 67"),
    (["run", BUNDLE, "--tokens", "-1"], "'-1' holds -1; the numbers start at 0"),
    (["run", BUNDLE, "--tokens", ",".join(["1"] * 129)], "a prompt of 129 tokens is longer than the model's context of 128"),
    (["run", BUNDLE, "--prompt", "a" * 129], "a prompt of 129 tokens is longer than the model's context of 128"),
    (["run", BUNDLE, "--prompt", "a\udcff"], "prompt 0 is not UTF-8 text"),
    (["eval", "nothing"], "nothing does not exist"),
    (["eval", MODEL, "--variant", "g2"], "model is a checkpoint; --variant names a graph of a bundle"),
    (["eval", MODEL + "/config.json"], "config.json is not a checkpoint"),
    (["eval", BUNDLE, "--text", "nothing.txt"], "nothing.txt: No such file or directory"),
    (["eval", BUNDLE, "--text", MODEL], "model: Is a directory"),
    (["eval", BUNDLE, "--text", MODEL + "/model.safetensors"], "model.safetensors is not UTF-8 text"),
    (["eval", BUNDLE, "--text", "/dev/null"], "the text has 0 tokens, at least 2 are needed"),
    ([*PROFILE, "--breakdown", "8"], "breakdown context 8 is not one of 4"),
    ([*PROFILE, "--variants", "g2,g7"], "variant 'g7' is not one of g1, g2"),
    ([*PROFILE, "--kinds", "decode,sleep"], "'sleep' is not one of decode, prefill, ttft"),
    ([*PROFILE, "--seconds", "nan"], "seconds nan is not a positive bound"),
    ([*PROFILE, "--out", "no/latency.json"], "no/latency.json cannot be written: "),
    ([*PROFILE, "--out", FAST], "fast.json exists; choose another name or remove it"),
    ([*PROFILE, "--batch", "1000000000"], "memory"),
    (["profile", "nothing"], "nothing is not a bundle"),
    (["sweep", MODEL, "out", "--contexts", "4", "--breakdown", "8"], "--breakdown 8 is not one of the contexts 4"),
    (["compare", FAST, "nothing.json"], "nothing.json does not exist; make one with 'headpool profile'"),
    (["compare", FAST, BUNDLE + "/headpool.json"], "headpool.json is not a results file: it has no schema and cells"),
    (["compare", FAST, MODEL + "/model.safetensors"], "model.safetensors is not a results file: "),
    (["compare", FAST, FAST, "--fail-above", "-1"], "--fail-above -1.0 is not a positive ratio"),
    (["report", "nothing.json"], "nothing.json does not exist"),
    (["report", FAST, "--out", FAST], "fast.json exists; choose another name or remove it"),
    (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    (["inspect", "nothing"], "nothing does not exist"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[" ".join(command)[:50] for command, _ in MISTAKES])
def test_mistakes(command: list[str], message: str, refused, made: Path) -> None:
    assert message in refused(*(word.replace("{made}", str(made)) for word in command))


def test_a_prompt_that_is_not_text(refused, made: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    assert refused("run", made / "bundle") == "the prompt on standard input is not UTF-8 text"


def test_bfloat16_on_a_cpu_without_it(refused, headpool, made: Path, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no bf16 Gemm: said when it is run, in one line, and a sweep leaves nothing."""
    words = ["--groups", "2", "--dtype", "bf16"]
    assert headpool("export", made / "model", tmp_path / "bf16", *words)[0] == 0
    assert "cannot run model.onnx (pattern grouped, bf16) on CPUExecutionProvider" in refused(
        "run", tmp_path / "bf16", "--tokens", "1"
    )
    assert "cannot run model.onnx" in refused(
        "sweep", made / "model", "out", *words, "--contexts", "4", "--quality-tokens", "0"
    )


COMMANDS_THAT_READ = [
    ["export", "PATH", "out"],
    ["export", "PATH", "out", "--weights", "link"],
    ["convert", "PATH", "out", "--groups", "1"],
    ["sweep", "PATH", "out", "--groups", "1"],
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
def test_a_full_disk(command: str, limit: int, headpool, file_size_limit, made: Path, tmp_path: Path, capfd) -> None:
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


# Other processes


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def start(*arguments: Any, **keywords: Any) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*HEADPOOL, *map(str, arguments)], env=environment, **{**pipes, **keywords})


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A config whose weights take seconds to draw and write."""
    path = tmp_path_factory.mktemp("slow") / "config.json"
    sizes = {"vocab_size": 150_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
    config = {"model_type": "llama", "num_attention_heads": 6, "max_position_embeddings": 512, **sizes}
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("sign", "command"), [("SIGINT", "export"), ("SIGTERM", "export"), ("SIGINT", "sweep")])
def test_an_interrupt_leaves_nothing(sign: str, command: str, slow: Path, made: Path, tmp_path: Path) -> None:
    """In the middle of writing weights, and of measuring."""
    endless = ["--groups", "2", "--samples", "100000000", "--contexts", "4", "--kinds", "decode"]
    process = start(
        command, *([slow, tmp_path / "out"] if command == "export" else [made / "model", tmp_path / "out", *endless])
    )
    inside = "*/*" if command == "export" else "*/bundle/headpool.json"
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(inside)) and not list(tmp_path.glob("." + inside)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(getattr(signal, sign))
    code, out, err = finished(process)
    assert (code, out) == (130, "")
    assert err.strip() == "headpool: interrupted; nothing half-written was left"
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_and_a_full_output(made: Path) -> None:
    process = start("run", made / "bundle", "--prompt", "a", "--max-new-tokens", "100")
    process.stdout.read(1)  # type: ignore[union-attr]
    process.stdout.close()  # type: ignore[union-attr]
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    process.wait(60)
    with open("/dev/full", "w") as full:
        code, _, err = finished(start("inspect", made / "model", stdout=full))
    assert code == 2
    assert err.startswith("headpool: No space left on device\n")
    assert "Traceback" not in err


def test_terminals_that_cannot_write_arrows(made: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [*HEADPOOL, "convert", str(made / "model"), str(tmp_path / "out"), "--groups", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 \\u2192 1 KV heads" in done.stdout


def test_names_that_are_not_unicode(headpool, refused, made: Path, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"m\xff")
    shutil.copytree(made / "model", model)
    assert "is not Unicode text; give the file or folder another name" in refused("export", model, "out")
    assert headpool("convert", made / "model", tmp_path / os.fsdecode(b"o\xff"), "--groups", "1")[0] in (0, 2)
