"""What a user gets wrong on the command line: one line that says so, exit code 2, nothing written, the inputs untouched."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import hf
import pytest
import t5

MODEL, BUNDLE, FAST = "{made}/model", "{made}/bundle", "{made}/fast.json"
SHORT = ["--tokens", "30", "--window", "16"]
RUN = ["run", BUNDLE, "--tokens", "1,2,3"]
PROFILE = ["profile", BUNDLE, "--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1"]
DIVIDE = "4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"
MISTAKES: list[tuple[list[str], str]] = [
    (["nonsense"], "command 'nonsense' is not one of doctor, inspect, convert, select, uptrain, export"),
    (["--nope"], "option --nope does not exist (see 'headpool --help')"),
    (["export", MODEL], "argument OUT is missing (see 'headpool export --help')"),
    (["convert", MODEL, "out"], "neither of --groups and --plan given; give one of them"),
    (["export", MODEL, "out", "--zzz"], "option --zzz does not exist (see 'headpool export --help')"),
    (
        ["export", MODEL, "out", "--dtyp", "fp16"],
        "option --dtyp does not exist; did you mean --dtype or --cache-dtype? (see 'headpool export --help')",
    ),
    (["export", MODEL, "out", "--groups"], "option --groups requires an argument (see 'headpool export --help')"),
    (["export", MODEL, "out", "more"], "got unexpected extra argument (more) (see 'headpool export --help')"),
    (["run", BUNDLE, "--chat=3"], "option --chat does not take a value (see 'headpool run --help')"),
    (["completion"], "argument SHELL is missing; choose from bash, zsh, fish (see 'headpool completion --help')"),
    (["export", "nothing", "out"], "nothing does not exist; give a Hugging Face folder"),
    (["export", MODEL + "/model.safetensors", "out"], "is a weight file; give the folder that holds it"),
    (["export", MODEL, "out", "--groups", "4"], DIVIDE),
    (["convert", MODEL, "out", "--groups", "4"], DIVIDE),
    (["sweep", MODEL, "out", "--groups", "3,4", "--contexts", "4"], DIVIDE),
    (["export", MODEL, "out", "--groups", "3,3"], "group counts 3, 3: name each once"),
    (["export", MODEL, "out", "--groups", "3,x"], "'3,x' is not a list of whole numbers such as 8,4,1"),
    (["export", MODEL, "out", "--groups", "0"], "'0' holds 0; the numbers start at 1"),
    (["convert", MODEL, "out", "--groups", "0"], "--groups: 0 is not in the range x>=1 (see 'headpool convert --help')"),
    (["convert", MODEL, "out", "--groups", "1e3"], "--groups: '1e3' is not a whole number (see 'headpool convert --help')"),
    (["convert", MODEL, "out", "--groups", "2,1"], "--groups: '2,1' is not a whole number; convert takes one count (see"),
    ([*RUN, "--top-p", "much"], "--top-p: 'much' is not a number (see 'headpool run --help')"),
    (["export", MODEL, "out", "--plan", FAST], "fast.json is not a plan; make one with 'headpool select'"),
    (["export", MODEL, "out", "--pattern", "gqa,paged"], "--pattern: 'paged' is not one of repeat, grouped, attention, gqa"),
    (
        ["export", MODEL, "out", "--dtype", "int8"],
        "--dtype: 'int8' is not one of fp32, fp16, bf16 (see 'headpool export --help')",
    ),
    (
        ["export", MODEL, "out", "--cache", "ring"],
        "--cache: 'ring' is not one of concat, static (see 'headpool export --help')",
    ),
    (
        ["convert", MODEL, "out", "--groups", "1", "--method", "optimal", "--calibration", "slef"],
        "calibration 'slef' cannot be read: No such file or directory; choose from self, random, none, or a text file",
    ),
    (
        ["export", MODEL, "out", "--groups", "1", "--method", "mean", "--calibration", "self"],
        "method mean makes no use of calibration self; leave it out, or choose from procrustes, optimal",
    ),
    (
        ["convert", MODEL, "out", "--glu-values", "4"],
        "method mean keeps the 8 channels of a value; choose optimal for values of 4",
    ),
    (["convert", MODEL, "out", "--glu-values", "9"], "glu-values 9 is not from 1 to 8, the channels of the model's heads"),
    (
        ["sweep", MODEL, "out", "--ffn", "relu"],
        "model has the weights of a swiglu FFN; --ffn takes a config.json, without weights",
    ),
    (["sweep", MODEL + "/config.json", "out", "--ffn", "relu,mish"], "--ffn: 'mish' is not one of relu, gelu, swish, glu, "),
    (["export", MODEL, MODEL], "model exists; choose another name or remove it"),
    (["convert", MODEL, MODEL, "--groups", "1"], "model exists; choose another name or remove it"),
    (["sweep", MODEL, MODEL], "model exists; choose another name or remove it"),
    (["export", MODEL, "no/out"], "no/out cannot be written: "),
    (["convert", MODEL, "no/out", "--groups", "1"], "no/out cannot be written: "),
    (["sweep", MODEL, "no/out"], "no/out cannot be written: "),
    (["export", MODEL, MODEL + "/config.json/out"], "config.json is not a folder; make it first, or choose another place"),
    (["export", MODEL, "/proc/out"], "/proc/out cannot be written: "),
    (["run", "nothing", "--tokens", "1"], "nothing is not a bundle: it does not exist; make one with 'headpool export'"),
    (["run", MODEL, "--tokens", "1"], "model is not a bundle: it has no headpool.json; make one with 'headpool export'"),
    (["run", MODEL + "/model.safetensors", "--tokens", "1"], "model.safetensors is not a bundle: it is a file; make one with"),
    (["run", "{made}", "--tokens", "1"], "{made} is not a bundle: it has no headpool.json, but holds {made}/bundle; give that"),
    (["convert", BUNDLE, "out", "--groups", "1"], "{made}/bundle is a bundle; give the checkpoint it was exported from"),
    (["uptrain", BUNDLE, "out", "--steps", "1", "--data", FAST], "{made}/bundle is a bundle; give the checkpoint it was"),
    (["run", BUNDLE + "/headpool.json", "--tokens", "1"], "headpool.json is not a bundle: it is a file; make one with"),
    ([*RUN, "--variant", "g9"], "variant 'g9' is not one of g2, g1"),
    (
        [*RUN, "--backend", "tpu"],
        "--backend: 'tpu' is not one of onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, onnxruntime-tensorrt-rtx",
    ),
    ([*RUN, "--prompt", "x"], "--tokens stands instead of --prompt and --chat; give one of them"),
    ([*RUN, "--capacity", "2"], "the prompt needs 3 cache rows, the capacity is 2; raise --capacity"),
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
    (["run", BUNDLE, "--prompt", "a\udcff"], "the prompt is not UTF-8 text"),
    (
        ["run", BUNDLE, "--prompt", ""],
        "the prompt is empty; give it some text, or --tokens 1 to begin with the model's first token",
    ),
    (["run", BUNDLE, "--prompt", "a", "--prompt", ""], "prompt 2 is empty; give it some text"),
    (["run", BUNDLE, "--prompt", "", "--chat"], "the prompt is empty; give it some text"),
    (["eval", "nothing"], "nothing does not exist"),
    (["eval", "{made}"], "{made} is not a bundle: it has no headpool.json, but holds {made}/bundle; give that"),
    (["eval", MODEL, "--variant", "g2"], "model is a checkpoint; --variant names a graph of a bundle"),
    (
        ["eval", MODEL, "--threads", "3"],
        "{made}/model is a checkpoint, which is scored in eager torch; --backend, --threads and --engine-weights are",
    ),
    (["eval", MODEL, "--backend", "tensorrt"], "is a checkpoint, which is scored in eager torch"),
    (["eval", MODEL + "/config.json"], "config.json is not a checkpoint"),
    (["eval", BUNDLE, *SHORT, "--text", "nothing.txt"], "nothing.txt: No such file or directory"),
    (["eval", BUNDLE, *SHORT, "--text", MODEL + "/model.safetensors"], "model.safetensors is not UTF-8 text"),
    (["eval", BUNDLE, *SHORT, "--text", MODEL], "is a folder; give a text file"),
    (["eval", BUNDLE, *SHORT, "--text", "/dev/null"], "the text has 0 of the at least 2 tokens that are needed"),
    ([*PROFILE, "--breakdown", "8"], "breakdown context 8 is not one of 4"),
    ([*PROFILE, "--variants", "g2,g7"], "variant 'g7' is not one of g1, g2"),
    ([*PROFILE, "--kinds", "decode,sleep"], "'sleep' is not one of decode, prefill, ttft"),
    ([*PROFILE, "--seconds", "nan"], "seconds nan is not a positive bound"),
    ([*PROFILE, "--out", "no/latency.json"], "no/latency.json cannot be written: "),
    ([*PROFILE, "--out", FAST], "fast.json exists; choose another name or remove it"),
    ([*PROFILE, "--batch", "1000000000"], "memory"),
    (["profile", "nothing"], "nothing is not a bundle: it does not exist"),
    (["profile", MODEL + "/config.json"], "config.json is not a bundle: it is a file"),
    (["compare", FAST, "nothing.json"], "nothing.json does not exist; make one with 'headpool profile'"),
    (["compare", FAST, BUNDLE + "/headpool.json"], "headpool.json is not a results file: it has no schema and cells"),
    (["compare", FAST, MODEL + "/model.safetensors"], "model.safetensors is not a results file: "),
    (["compare", FAST, FAST, "--fail-above", "-1"], "--fail-above -1.0 is not a positive ratio"),
    (["report", "nothing.json"], "nothing.json does not exist"),
    (["report", FAST, "{made}/bundle/../fast.json"], "fast.json is given twice; its figures could not be told apart, name it"),
    (["report", FAST, "--out", FAST], "fast.json exists; choose another name or remove it"),
    (["completion", "tcsh"], "SHELL: 'tcsh' is not one of bash, zsh, fish (see 'headpool completion --help')"),
    (["inspect", "nothing"], "nothing does not exist"),
    (["inspect", FAST], "fast.json is a results file of 'headpool profile' or 'sweep'; read it with 'headpool report' or"),
    (["export", MODEL, "out", "--pattern", "fused", "--dtype", "fp16"], "it is fp16; headpool's operators are for fp32"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[" ".join(command)[:50] for command, _ in MISTAKES])
def test_mistakes(command: list[str], message: str, refused, made: Path) -> None:
    said = refused(*(word.replace("{made}", str(made)) for word in command))
    assert message.replace("{made}", str(made)) in said
    assert not said.endswith(".")
    assert ". (" not in said


LONG = "is more than the model's 128 (max_position_embeddings); choose contexts up to"
EARLY: list[tuple[list[str], str]] = [
    (["eval", BUNDLE, *SHORT, "--reference", "nope"], "nope does not exist; give a Hugging Face folder"),
    (["eval", BUNDLE, *SHORT, "--reference", "."], ". has no config.json; give a Hugging Face folder"),
    (["eval", MODEL, *SHORT, "--reference", FAST], "fast.json is not a checkpoint; give a Hugging Face folder"),
    (["eval", BUNDLE, *SHORT, "--text", "nope"], "nope: No such file or directory"),
    (["eval", BUNDLE, *SHORT, "--text", "/dev/null"], "the text has 0 of the at least 2 tokens that are needed"),
    (
        ["eval", BUNDLE, "--window", "129"],
        "--window 129 is more than the context of {made}/bundle, 128 tokens; choose up to 128",
    ),
    (["eval", MODEL, "--window", "129"], "--window 129 is more than the context of {made}/model, 128 tokens; choose up to 128"),
    (["profile", BUNDLE, "--contexts", "4,200"], f"a context of 200 tokens and the one decoded after it {LONG} 127"),
    (["profile", BUNDLE, "--contexts", "128"], f"a context of 128 tokens and the one decoded after it {LONG} 127"),
    (["profile", BUNDLE, "--contexts", "129", "--kinds", "prefill"], f"a context of 129 tokens {LONG} 128"),
    (["profile", BUNDLE, "--contexts", "4", "--breakdown", "8"], "breakdown context 8 is not one of 4"),
    (["sweep", MODEL, "out", "--contexts", "4,200"], f"a context of 200 tokens and the one decoded after it {LONG} 127"),
    (["sweep", MODEL + "/config.json", "out", "--contexts", "129", "--kinds", "ttft"], f"a context of 129 tokens {LONG} 128"),
    (["sweep", MODEL, "out", "--contexts", "4", "--breakdown", "8"], "breakdown context 8 is not one of 4"),
    (
        ["sweep", MODEL, "out", "--contexts", "4", "--quality-tokens", "1"],
        "the text has 1 of the at least 2 tokens that are needed",
    ),
    (
        ["sweep", MODEL, "out", "--contexts", "4", "--dtype", "bf16", "--pattern", "gqa"],
        "cannot run pattern gqa, static cache, bf16 on CPUExecutionProvider: no kernel for bf16; choose another --dtype",
    ),
    (["sweep", MODEL, "out", "--contexts", "4", "--dtype", "fp16", "--pattern", "fused"], "pattern fused does not fit this"),
    (
        ["sweep", MODEL, "out", "--contexts", "4", "--backend", "tensorrt-rtx"],
        "sweep builds no engines, and tensorrt-rtx runs nothing else; take the steps one by one: headpool export, "
        "headpool build --backend tensorrt-rtx, headpool profile --backend tensorrt-rtx",
    ),
    (
        ["sweep", MODEL, "out", "--contexts", "4", "--backend", "onnxruntime-tensorrt", "--pattern", "gqa"],
        "a graph (gqa, static cache) does not run on onnxruntime-tensorrt, which takes the patterns attention and grouped ",
    ),
    (["sweep", MODEL, MODEL + "/out"], "{made}/model/out is inside {made}/model, which is only read; choose a place outside"),
    (
        ["profile", BUNDLE, "--contexts", "8", "--out", BUNDLE + "/x.json"],
        "{made}/bundle/x.json is inside {made}/bundle, which is only read",
    ),
    (["select", MODEL, "--kv-budget", "0.5", "--out", MODEL + "/x.json"], "{made}/model/x.json is inside {made}/model, which"),
    (["report", BUNDLE], "{made}/bundle is a folder; give the results file in it, {made}/bundle/results.json after a sweep"),
    (["inspect", "{made}"], "{made} is not a bundle: it has no headpool.json, but holds {made}/bundle; give that"),
    (["inspect", "/dev/null"], "/dev/null is neither a file nor a folder; give a Hugging Face folder"),
    (["export", MODEL, MODEL + "/out"], "{made}/model/out is inside {made}/model, which is only read; choose a place outside"),
    (["convert", MODEL, MODEL + "/out", "--groups", "1"], "model/out is inside {made}/model, which is only read"),
    (["uptrain", MODEL, MODEL + "/../model/out", "--steps", "1", "--data", FAST], "model/out is inside {made}/model, which"),
    (["profile", BUNDLE, BUNDLE + "/../bundle"], "bundle is given twice; its figures could not be told apart, name it once"),
    (["profile", "nope", "--out", FAST], "nope is not a bundle: it does not exist"),
    (["profile", BUNDLE, "--seconds", "-1", "--out", FAST], "seconds -1.0 is not a positive bound"),
    (["profile", BUNDLE, "--variants", "g7", "--contexts", "4", "--out", FAST], "variant 'g7' is not one of g1, g2"),
]


@pytest.fixture
def idle(monkeypatch) -> None:
    """No model is opened, exported or measured."""
    for place in ("exporter.serve.Model.session", "profiles.sweep.export", "profiles.bundles.BandwidthProbe"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("the work has begun"))


@pytest.mark.parametrize(("command", "message"), EARLY, ids=[" ".join(command)[:70] for command, _ in EARLY])
def test_mistakes_are_noticed_before_the_work(command: list[str], message: str, idle, refused, made: Path) -> None:
    said = refused(*(word.replace("{made}", str(made)) for word in command))
    assert message.replace("{made}", str(made)) in said


def test_the_longest_context_that_fits_is_measured(headpool, made: Path, tmp_path: Path) -> None:
    few = ["--samples", "1", "--prefill-samples", "1", "--threads", "1"]
    for name, context, kinds in (("a", 127, "decode"), ("b", 128, "prefill")):
        words = ["--contexts", context, "--kinds", kinds, "--variants", "g2", "--out", tmp_path / name]
        assert headpool("profile", made / "bundle", *words, *few)[0] == 0


def test_a_reference_of_another_vocabulary(idle, refused, made: Path, tmp_path: Path) -> None:
    other = hf.build("llama", {"vocab_size": 71})
    other.save_pretrained(tmp_path / "other")
    message = (
        f"{made}/bundle has a vocabulary of 67 tokens and its reference {tmp_path}/other one of 71; "
        "only models with the same vocabulary can be compared"
    )
    assert refused("eval", made / "bundle", *SHORT, "--reference", tmp_path / "other") == message


@pytest.mark.parametrize("held", [b"", b"\n", b"\n\n"])
def test_an_empty_standard_input(held: bytes, refused, made: Path, monkeypatch) -> None:
    message = "standard input holds no prompt; give one there, with --prompt, or as token ids with --tokens"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(held)))
    assert refused("run", made / "bundle") == message
    monkeypatch.setattr(sys, "stdin", None)  # closed by the shell: <&-
    assert refused("run", made / "bundle") == message


def test_a_prompt_that_is_not_text(refused, made: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    assert refused("run", made / "bundle") == "the prompt on standard input is not UTF-8 text"


def test_ffns_of_an_encoder_decoder(refused, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "t5", **t5.SIZES}))
    assert "is an encoder-decoder (t5); --ffn takes decoder-only models" in refused("sweep", config, "out", "--ffn", "relu")


def test_a_plan_is_no_config(refused, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"model": "x", "heads": 2, "kv_heads_before": [2], "kv_heads": [1]}')
    assert refused("inspect", "plan.json").startswith("plan.json is a plan of 'headpool select'; give it to convert, export")


@pytest.mark.parametrize("held", ["", " \n"])
def test_an_empty_json_file(held: str, refused, made: Path, tmp_path: Path) -> None:
    for name in ("empty.json", "headpool.json"):
        (tmp_path / name).write_text(held)
    assert refused("inspect", "empty.json") == "empty.json is not JSON: it is empty"
    assert refused("report", "empty.json").startswith("empty.json is not a results file: it is empty; make one with")
    assert refused("export", made / "model", "out", "--plan", "empty.json") == "plan empty.json is not JSON: it is empty"
    assert refused("run", tmp_path, "--tokens", "1") == f"{tmp_path}/headpool.json cannot be read: it is empty; export it again"


def test_a_bundle_without_a_tokenizer(refused, made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made / "bundle", tmp_path / "bare"))
    (bundle / "tokenizer.json").unlink()
    assert refused("eval", bundle, *SHORT) == f"{bundle} has no tokenizer.json; give a model that carries its tokenizer"
    assert refused("run", bundle, "--prompt", "a").startswith(
        f"{bundle} has no tokenizer.json; give token ids with --tokens, or"
    )


def test_bfloat16_on_a_cpu_without_it(refused, headpool, made: Path, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no bf16 Gemm: said when it is run, in one line."""
    words = ["--groups", "2", "--dtype", "bf16"]
    assert headpool("export", made / "model", tmp_path / "bf16", *words)[0] == 0
    said = refused("run", tmp_path / "bf16", "--tokens", "1")
    assert said.startswith("onnxruntime ")
    assert said.endswith(
        "cannot run model.onnx (pattern grouped, bf16) on CPUExecutionProvider: no kernel for bf16 in pattern grouped; "
        "export with another --dtype or --pattern"
    )
