"""The whole line on SmolLM2-135M, through the command line: convert, inspect, export, run, eval, held against transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from harness import operators

from exporter.cli import _run
from graphs.patterns import PATTERNS

TOKENS = 24
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def greedy(smollm2_mha) -> dict[str, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_mha, dtype=torch.float32).eval()
    assert model.config.num_key_value_heads == 9
    model.generation_config.eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_mha)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return {"prompt": ids[0].tolist(), "tokens": out[0, ids.shape[1] :].tolist()}


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("kv_heads", "pattern"), [*((3, pattern) for pattern in PATTERNS), (9, "gqa"), (9, "fused")])
def test_greedy_tokens_are_those_of_transformers(kv_heads, pattern, smollm2_bundle, greedy, capsys):
    """At 9 and at 3: the heads of a group are equal, so pooling them back loses nothing. Every pattern and cache form at both,
    longer and from five prompts, is profiles/benchmarks/parity.py's."""
    if pattern == "fused":
        operators()
    arguments = [
        "run",
        str(smollm2_bundle),
        "--variant",
        f"g{kv_heads}.{pattern}",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        str(TOKENS),
        "--json",
    ]
    assert _run(arguments) == 0
    report = last_json(capsys)
    assert report["prompt_tokens"] == [len(greedy["prompt"])]
    (tokens,) = report["tokens"]
    ends = [index for index, token in enumerate(greedy["tokens"]) if token == 2]  # run stops at the end token
    expected = greedy["tokens"][: ends[0] + 1] if ends else greedy["tokens"]
    assert tokens == expected
    assert len(tokens) >= 12


def test_eval_agrees_with_torch(smollm2_bundle, smollm2, capsys):
    arguments = ["eval", str(smollm2_bundle), "--variant", "g3.grouped", "--tokens", "96", "--window", "64"]
    assert _run([*arguments, "--reference", str(smollm2), "--json"]) == 0
    report = last_json(capsys)
    assert 1.5 < report["nats_per_token"] < 4.5  # sensible text, not noise (ln 49152 = 10.8)
    assert report["same_token"] == 1.0
    assert report["mean_kl"] < 1e-6


def test_inspect_says_what_it_is(smollm2, capsys):
    assert _run(["inspect", str(smollm2), "--json"]) == 0
    model = last_json(capsys)["model"]
    assert model["parameters"] == 134_515_008
    assert model["kv_heads"] == [3] * 30
    assert model["kv_bytes_per_token"]["fp32"] == 46_080
    assert (model["ffn"], model["tied_embedding"]) == ("swiglu", True)


def test_linked_weights_are_the_checkpoints_own(smollm2_mha, smollm2_bundle):
    assert (smollm2_bundle / "model.safetensors").samefile(smollm2_mha / "model.safetensors")
    own = sum(path.stat().st_size for path in smollm2_bundle.iterdir() if path.stat().st_nlink == 1)
    assert own < 40e6
