"""What each command does when all is well."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import hf
import numpy as np
import pytest

from exporter.tokenizer import Tokenizer
from exporter.uptrain.stage import Uptrained


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


def test_sweep_over_ffns_of_equal_parameters(headpool, made: Path, tmp_path: Path) -> None:
    arguments = ["--groups", "2", "--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1"]
    config = made / "model/config.json"
    code, out, _ = headpool("sweep", config, tmp_path / "out", "--ffn", "relu,swiglu,relu", *arguments, "--json")
    assert code == 0
    data = json.loads(out.splitlines()[-1])
    assert [(entry["kind"], entry["d_ff"]) for entry in data["ffn"]] == [("relu", 60), ("swiglu", 40)]
    relu, swiglu = data["ffn"]
    assert data["bundles"] == [str(tmp_path / "out" / f"bundle-{kind}") for kind in ("relu", "swiglu")]
    assert relu["ffn_parameters"] == swiglu["ffn_parameters"] == 2 * 2 * 48 * 60
    assert relu["parameters"] == swiglu["parameters"]
    assert [cell["variant"] for cell in data["cells"]] == ["g2", "g2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("bundle-relu", "bundle-swiglu", "report.html", "results.json")
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert ", relu 60" in page
    assert ", swiglu 40" in page
    made_of = json.loads((tmp_path / "out/bundle-relu/config.json").read_text())
    assert (made_of["model_type"], made_of["ffn"], made_of["intermediate_size"]) == ("headpool", "relu", 60)


def test_glu_attention_starts_where_the_model_was(headpool, made: Path, tmp_path: Path) -> None:
    code, out, _ = headpool("convert", made / "model", tmp_path / "glu", "--glu-values", "8")
    assert (code, out) == (
        0,
        f"{tmp_path}/glu: 2 → 2 KV heads of 6 query heads, GLU attention with values of 8\n",
    )
    code, out, _ = headpool(
        *("eval", tmp_path / "glu", "--reference", made / "model", "--tokens", "64", "--window", "32"), "--json"
    )
    assert code == 0, out
    assert json.loads(out.splitlines()[-1])["mean_kl"] < 1e-6
    assert headpool("convert", tmp_path / "glu", tmp_path / "twice", "--glu-values", "8")[0] == 2
    lossy = ("--glu-values", "4", "--method", "optimal", "--calibration", "none")
    code, out, _ = headpool("convert", made / "model", tmp_path / "narrow", *lossy)
    assert (code, out.rpartition("GLU")[2]) == (0, " attention with values of 4, by optimal, groups as they lie, no tokens\n")


def test_more_heads_are_said_to_be_repeated(headpool, made: Path, tmp_path: Path) -> None:
    code, out, _ = headpool("convert", made / "model", tmp_path / "mha", "--groups", "6")
    assert (code, out) == (0, f"{tmp_path}/mha: 2 → 6 KV heads of 6 query heads, by repetition\n")
    code, out, _ = headpool("convert", made / "model", tmp_path / "same", "--groups", "2")
    assert (code, out) == (0, f"{tmp_path}/same: 2 → 2 KV heads of 6 query heads: none changed\n")


def test_a_tokenizer_of_another_model_is_noticed_before_anything_is_measured(headpool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["e"] = 900
    file.write_text(json.dumps(tokenizer))
    code, out, err = headpool("sweep", tmp_path / "model", tmp_path / "out", "--contexts", "4", "--quality-tokens", "60")
    assert (code, out) == (2, "")
    assert err.endswith(" has token id 900, which is outside its vocabulary of 67; sweep without quality: --quality-tokens 0\n")


def test_repeats_in_lists_are_measured_once(headpool, made: Path, tmp_path: Path) -> None:
    """What would be measured twice could not be told apart, and compare would refuse the file."""
    lists = ["--contexts", "4,4", "--batch", "1,2,1", "--kinds", "decode,decode", "--breakdown", "4,4", "--variants", "g2"]
    few = ["--samples", "2", "--threads", "1", "--out", tmp_path / "out", "--json"]
    code, out, _ = headpool("profile", made / "bundle", *lists, *few)
    assert code == 0
    assert [cell["batch"] for cell in json.loads(out.splitlines()[-1])["cells"]] == [1, 2]
    assert headpool("compare", tmp_path / "out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(("passes", "said"), [(1.0, "1 pass over"), (0.96, "0.96 passes over"), (3.0, "3 passes over")])
def test_uptrain_counts_its_passes(passes: float, said: str, headpool, tmp_path: Path, monkeypatch) -> None:
    done = Uptrained(1, 64, passes, 2.0, 1.5, 3.0, 1, "fp32", 100)
    monkeypatch.setattr("exporter.uptrain.uptrain", lambda *_: done)
    code, out, _ = headpool("uptrain", "model", tmp_path / "out", "--data", "text", "--steps", "1")
    assert (code, out.splitlines()[0]) == (0, f"{tmp_path}/out: 1 step, 64 tokens, {said} the data, 3.0 s in fp32")


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
    assert re.match(r"opened in \S+ s, first token after ", err)
    for capacity in (16, 100):
        data = json.loads(headpool(*command, "--tokens", "5,9,33,17", "--capacity", capacity, "--json")[1])
        assert data["tokens"] == [expected]
        assert data["texts"] == [Tokenizer.open(made / "bundle").decode(np.array(expected))]


def test_run_prompts(headpool, made: Path, monkeypatch) -> None:
    command = ["run", made / "bundle", "--max-new-tokens", "6"]
    one = headpool(*command, "--prompt", "Hello")
    assert one[0] == 0
    two = headpool(*command, "--prompt", "Hello", "--prompt", "to all of you")
    assert two[1].splitlines()[0] == f"[1] {one[1].rstrip(chr(10))}"
    assert two[1].splitlines()[1].startswith("[2] ")
    assert " ms a token (" in one[2]
    assert " ms a step of 2 tokens (" in two[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert headpool(*command)[1] == one[1]
    chat = json.loads(headpool(*command, "--prompt", "Hello", "--chat", "--json")[1])
    assert chat["prompt_tokens"] == [len("Q Hello A ")]


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
    for name, factor in (("fast", 1), ("slow", 10)):
        cells = [cell | {"samples": [factor * sample for sample in cell["samples"]] * 6} for cell in data["cells"]]
        (tmp_path / f"{name}.json").write_text(json.dumps(data | {"cells": cells}))
    fast, slow = tmp_path / "fast.json", tmp_path / "slow.json"
    assert headpool("compare", fast, slow)[0] == 0
    assert headpool("compare", fast, slow, "--fail-above", "1.5")[0] == 1
    assert headpool("compare", slow, fast, "--fail-above", "1.5")[0] == 0


def test_cells_and_pairs_can_be_told_apart(headpool, made: Path, tmp_path: Path) -> None:
    words = ["--variants", "g2", "--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1"]
    _, out, _ = headpool("profile", made / "bundle", *words, "--out", tmp_path / "other.json", "--json")
    named = {"model": "model", "bundle": "bundle", "variant": "g2", "backend": "onnxruntime"}
    common = {"groups": 2, "pattern": "grouped", "cache": "static", "dtype": "fp32", "kind": "decode", "batch": 1, "context": 4}
    [cell] = json.loads(out.splitlines()[-1])["cells"]
    assert cell.items() >= (named | common).items()
    other = json.loads((tmp_path / "other.json").read_text())
    other["cells"][0]["backend"] = "tensorrt"
    (tmp_path / "other.json").write_text(json.dumps(other))
    [pair] = json.loads(headpool("compare", made / "fast.json", tmp_path / "other.json", "--json")[1].splitlines()[-1])["pairs"]
    assert pair.items() >= (named | common | {"b": named | {"backend": "tensorrt"}}).items()
