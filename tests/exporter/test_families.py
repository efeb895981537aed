"""Every family against transformers: the torch model and the exported bundle, prefill, chunked prefill and decode."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import harness
import hf
import numpy as np
import pytest
import torch

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint, write_checkpoint
from exporter.convert import convert_weights
from exporter.engines import open_session
from exporter.engines.base import Session
from exporter.engines.torch_eager import open_torch
from exporter.errors import UserError
from exporter.export import ExportOptions, export
from exporter.models.decoder import Decoder

TOLERANCE = 2e-4  # absolute, of logits of order 1 to 10 in float32
PATTERNS = ("repeat", "grouped", "attention", "gqa")
Calls = tuple[tuple[int, ...] | None, ...]
FAMILIES = (  # each in every pattern and cache form
    *("llama", "llama-tied-biased", "llama-glu-llama3", "llama-bilinear-linear", "llama-mqa-relu-yarn"),
    *("mistral", "qwen2", "qwen3", "gemma", "phi3-partial", "starcoder2"),
)
# What is fed, one item a call: prompts of these lengths, or (None) a token for each row of the batch.
ONE = ((23,), None, None, (40,), None)  # past the first context of 16 of yarn and llama3, in chunks of 9
THREE = ((3, 21, 7), None, (6, 1, 12), None)


@functools.cache
def script(theirs: Any, calls: Calls) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """The random tokens of each call and, after it, transformers' logits [batch, V] of the last ones."""
    random = np.random.default_rng(1)
    batch = len(calls[0] or ())
    rows = [np.zeros(0, np.int64) for _ in range(batch)]
    result = []
    for call in calls:
        prompts = [random.integers(0, theirs.config.vocab_size, n) for n in call or [1] * batch]
        rows = [np.concatenate(pair) for pair in zip(rows, prompts, strict=True)]
        expected = np.stack([hf.logits(theirs, row)[-1] for row in rows])
        assert expected.std() > 0.3  # flat logits would hide a mistake
        result.append((prompts, expected))
    return result


def follow(session: Session, theirs: Any, calls: Calls) -> None:
    """Compare the logits of every call with transformers'."""
    for call, (prompts, expected) in zip(calls, script(theirs, calls), strict=True):
        ours = session.prefill(prompts) if call else session.decode(np.concatenate(prompts))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def check_bundle(bundle: Bundle, theirs: Any, patterns: tuple[str, ...] = hf.PATTERNS["static"]) -> None:
    for variant in (variant for variant in bundle.variants if variant.pattern in patterns):
        for calls in (ONE, THREE):
            with open_session(bundle, variant, batch=len(calls[0]), capacity=70, threads=1, chunk=9) as session:
                follow(session, theirs, calls)


@pytest.mark.parametrize("name", hf.MODELS)
def test_the_torch_model(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hf.save(name, tmp_path))
    model = Decoder.from_weights(checkpoint.config, checkpoint.weights)
    tokens = np.random.default_rng(0).integers(0, 67, 60)
    ids, positions, mask = torch.from_numpy(tokens)[None], torch.arange(60)[None], torch.ones(1, 60, dtype=torch.int64)
    static, _ = model(ids, positions, model.empty_cache(1, 60))
    np.testing.assert_allclose(static[0], hf.logits(hf.model(name), tokens), rtol=0, atol=TOLERANCE)
    concat, _ = model(ids, positions, model.empty_cache(1, 0), mask)
    np.testing.assert_allclose(concat, static, rtol=0, atol=TOLERANCE)
    with open_torch(checkpoint, batch=3, capacity=70, chunk=9) as session:
        follow(session, hf.model(name), THREE)


@pytest.mark.parametrize("form", ["static", "concat", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bundle(name: str, form: Any, shared: Path) -> None:
    own = form == "fused" and bool(harness.operators())
    bundle = hf.bundle(name, "static" if own else form, shared)
    check_bundle(bundle, hf.model(name), ("fused",) if own else PATTERNS)


def test_logits_of_every_position(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hf.save("llama", tmp_path))
    tokens = np.random.default_rng(3).integers(0, 67, (3, 40))
    expected = np.stack([hf.logits(hf.model("llama"), row) for row in tokens])
    for cache in ("static", "concat"):
        options = ExportOptions(patterns=("grouped", "attention"), cache=cache, logits="all")  # type: ignore[arg-type]
        bundle = export(checkpoint, tmp_path / cache, options)
        for variant in bundle.variants:
            with open_session(bundle, variant, batch=3, capacity=40, threads=1, chunk=16) as session:
                blocks = list(session.score(tokens, 5))
            assert [block.shape[1] for block in blocks] == [11, 16, 8]  # 40 tokens in chunks of 16, without the first 5
            np.testing.assert_allclose(np.concatenate(blocks, axis=1), expected[:, 5:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("patterns", [("grouped", "attention", "repeat"), ("fused",)], ids="-".join)
def test_kv_heads_that_differ_from_layer_to_layer(patterns: tuple[str, ...], tmp_path: Path) -> None:
    """Transformers knows one number for all layers, so it gets every layer degrouped to MHA, which is exact."""
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    config, weights = convert_weights(source.config, source.weights, (3, 1))
    mixed = dataclasses.replace(source, config=config, weights=weights)
    full_config, full_weights = convert_weights(config, weights, 6)
    write_checkpoint(dataclasses.replace(source, config=full_config, weights=full_weights), tmp_path / "mha")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mha", attn_implementation="eager").float().eval()
    if "fused" in patterns:
        harness.operators()
    bundle = export(mixed, tmp_path / "out", ExportOptions(patterns=patterns, cache="static"))
    names = [variant.name for variant in bundle.variants]
    assert names == ([f"gsum4.{pattern}" for pattern in patterns] if len(patterns) > 1 else ["gsum4"])
    assert bundle.variants[0].groups == (3, 1)
    check_bundle(bundle, theirs)


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "pattern", "cache"),
    [
        (8, 3, 1, "attention", "static"),
        (80, 2, 2, "gqa", "static"),
        (96, 3, 3, "grouped", "concat"),
        (128, 2, 1, "repeat", "static"),
        (256, 2, 1, "gqa", "concat"),
        (20, 6, 2, "fused", "static"),
        (80, 9, 1, "fused", "static"),
        (128, 2, 2, "fused", "static"),
    ],
)
def test_one_layer_of_odd_sizes(head_dim: int, heads: int, kv_heads: int, pattern: str, cache: Any, tmp_path: Path) -> None:
    if pattern == "fused":
        harness.operators()
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "num_hidden_layers": 1}
    theirs = hf.build("llama", {**sizes, "hidden_size": 11 * heads, "intermediate_size": 17, "vocab_size": 101})
    theirs.save_pretrained(tmp_path / "in")
    bundle = export(open_checkpoint(tmp_path / "in"), tmp_path / "out", ExportOptions(patterns=(pattern,), cache=cache))
    check_bundle(bundle, theirs)


def test_a_pattern_that_the_head_size_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))  # D = 12
    with pytest.raises(UserError, match=r"pattern gqa does not fit this model: its heads have 12 channels; .* a multiple of 8"):
        export(checkpoint, tmp_path / "out", ExportOptions(patterns=("grouped", "gqa")))
    assert {path.name for path in tmp_path.iterdir()} == {"llama-mha-gelu"}
