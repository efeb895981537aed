"""Bundles of a T5 in ONNX Runtime, every pattern and cache form, MHA and GQA, against transformers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import t5
import torch
from transformers import AutoModelForSeq2SeqLM

from exporter.bundle import Bundle, Seq2SeqVariant
from exporter.checkpoint import open_checkpoint, write_checkpoint
from exporter.convert import convert_weights
from exporter.engines import open_session
from exporter.engines.operators import operator_library
from exporter.engines.seq2seq import Seq2SeqSession
from exporter.engines.torch_eager import open_torch
from exporter.errors import BundleError, EngineError, UserError
from exporter.export import ExportOptions, export
from exporter.generate import generate

PATTERNS = ("grouped", "gqa", "attention", "repeat")  # in both cache forms
FORMS = [(groups, pattern, cache) for groups in (6, 2) for pattern in PATTERNS for cache in ("static", "concat")]
FORMS += [(6, "fused", "static"), (2, "fused", "static")]
TOLERANCE = 2e-4  # absolute, on logits of about ±10
SOURCES = [np.arange(41) * 7 % 66 + 1, np.arange(9) * 5 % 66 + 1]
STEPS = 70  # past row 64, where the static cache grows
TARGETS = np.concatenate([np.zeros((2, 1), np.int64), np.random.default_rng(0).integers(1, 67, (2, STEPS))], axis=1)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = open_checkpoint(t5.save("t5-1.1", folder))
    return {
        cache: export(checkpoint, folder / cache, ExportOptions((6, 2), patterns=patterns, cache=cache, logits="all"))
        for cache, patterns in (("static", (*PATTERNS, "fused")), ("concat", PATTERNS))
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """transformers' model of each group count; it knows fewer KV heads only repeated."""
    folder = tmp_path_factory.mktemp("theirs")
    checkpoint = open_checkpoint(t5.save("t5-1.1", folder))
    few = convert_weights(checkpoint.config, checkpoint.weights, 2)
    config, weights = convert_weights(*few, 6)
    write_checkpoint(dataclasses.replace(checkpoint, config=config, weights=weights), folder / "repeated")
    return {6: t5.model("t5-1.1"), 2: AutoModelForSeq2SeqLM.from_pretrained(folder / "repeated").eval()}


def expected(model: Any) -> np.ndarray:
    """float32 [2, STEPS + 1, V], each sequence alone."""
    with torch.no_grad():
        rows = [
            model(input_ids=torch.from_numpy(source)[None], decoder_input_ids=torch.from_numpy(target)[None]).logits
            for source, target in zip(SOURCES, TARGETS, strict=True)
        ]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(("groups", "pattern", "cache"), FORMS)
def test_logits(groups: int, pattern: str, cache: str, bundles: dict[str, Bundle], theirs: dict[int, Any]) -> None:
    """Step by step in a batch of unequal inputs; then back, and other tokens."""
    wanted = expected(theirs[groups])
    with open_session(bundles[cache], f"g{groups}.{pattern}", batch=2, capacity=150, threads=1) as session:
        found = [session.prefill(SOURCES).copy()]
        found += [session.decode(tokens).copy() for tokens in TARGETS.T[1:]]
        np.testing.assert_allclose(np.stack(found, axis=1), wanted, rtol=0, atol=TOLERANCE)
        assert session.lengths.tolist() == [41 + STEPS, 9 + STEPS]
        assert session.kv_bytes() == (50 + 2 * STEPS + 2) * 2 * groups * 16 * 4
        with pytest.raises(EngineError, match=r"cannot rewind to 41 tokens: the inputs, of \[9, 41\] tokens, stay whole"):
            session.rewind(41)
        session.reset()
        np.testing.assert_allclose(session.prefill(SOURCES), wanted[:, 0], rtol=0, atol=TOLERANCE)
    with open_session(bundles[cache], f"g{groups}.{pattern}", capacity=150, threads=1) as session:
        session.prefill(SOURCES[:1])
        for token in (5, 6, 7):
            session.decode(np.array([token]))
        session.rewind(41)
        found = [session.decode(TARGETS[:1, step]).copy() for step in range(1, 6)]
        np.testing.assert_allclose(np.concatenate(found), wanted[0, 1:6], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["t5", "t5-wide", "mt5"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """A tied head that is scaled, relu; heads that are wider than the model; mT5's buckets, which end at 128 tokens: greedy
    tokens and logits, inputs and outputs longer than that."""
    checkpoint = open_checkpoint(t5.save(name, tmp_path))
    bundle = export(checkpoint, tmp_path / "static", ExportOptions(patterns=("fused", "grouped"), cache="static"))
    concat = export(checkpoint, tmp_path / "concat", ExportOptions(patterns=("grouped",), cache="concat"))
    sources = [np.random.default_rng(1).integers(1, 67, 150), np.arange(40) * 3 % 66 + 1]
    with open_session(bundle, "g6.fused", batch=2, capacity=300, threads=1) as session:
        greedy = np.stack(list(generate(session, sources, 140, stop_ids=())), axis=1)
    targets = np.concatenate([np.zeros((2, 1), np.int64), greedy], axis=1)
    wanted = np.stack([t5.logits(name, source, target[:-1]) for source, target in zip(sources, targets, strict=True)])
    assert (wanted.argmax(-1) == greedy).all()
    for opened, variant in ((bundle, "g6.fused"), (bundle, "g6.grouped"), (concat, "g6")):
        with open_session(opened, variant, batch=2, capacity=300, threads=1) as session:
            found = [session.prefill(sources).copy()]
            found += [session.decode(tokens).copy() for tokens in greedy.T[:-1]]
        np.testing.assert_allclose(np.stack(found, axis=1), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("groups", "pattern", "cache"), FORMS)
def test_several_tokens_at_once(
    groups: int, pattern: str, cache: str, bundles: dict[str, Bundle], theirs: dict[int, Any]
) -> None:
    """The graphs themselves: a chunk of 20 decoder tokens, then one of 11 on top of it."""
    bundle = bundles[cache]
    variant = bundle.variant(f"g{groups}.{pattern}")
    assert isinstance(variant, Seq2SeqVariant)
    options = onnxruntime.SessionOptions()
    if pattern == "fused":
        options.register_custom_ops_library(str(operator_library()))
    encoder, decoder = (onnxruntime.InferenceSession(bundle.path / name, options) for name in (variant.encoder, variant.graph))
    source = SOURCES[0][None]
    read = dict(
        zip(
            [value.name.replace("present", "past_key_values") for value in encoder.get_outputs()],
            encoder.run(None, {"input_ids": source, "attention_mask": np.ones_like(source)}),
            strict=True,
        )
    )
    del read["last_hidden_state"]
    rows = 40 if cache == "static" else 0
    names = [value.name for value in decoder.get_inputs() if ".decoder." in value.name]
    past = {name: np.zeros((1, groups, rows, 8), np.float32) for name in names}
    found = []
    for start, end in ((0, 20), (20, 31)):
        positions = {"position_ids": np.arange(start, end)[None]} if cache == "static" else {}
        given = {"input_ids": TARGETS[:1, start:end], "encoder_attention_mask": np.ones_like(source), **positions}
        logits, *present = decoder.run(None, {**given, **past, **read})
        past = dict(zip(names, present, strict=True))
        found.append(logits[0])
    np.testing.assert_allclose(np.concatenate(found), expected(theirs[groups])[0, :31], rtol=0, atol=TOLERANCE)


def test_greedy_tokens(bundles: dict[str, Bundle], theirs: dict[int, Any]) -> None:
    with open_session(bundles["static"], "g2.grouped", capacity=80, threads=1) as session:
        found = [int(tokens[0]) for tokens in generate(session, SOURCES[:1], 24, stop_ids=(1,))]
    ids = torch.from_numpy(SOURCES[0])[None]
    wanted = theirs[2].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert found == wanted[0, 1:].tolist()


def test_torch_session(theirs: dict[int, Any], tmp_path: Path) -> None:
    with open_torch(open_checkpoint(t5.save("t5-1.1", tmp_path)), batch=2, capacity=150) as session:
        found = [session.prefill(SOURCES).copy(), *(session.decode(tokens).copy() for tokens in TARGETS.T[1:])]
    np.testing.assert_allclose(np.stack(found, axis=1), expected(theirs[6]), rtol=0, atol=TOLERANCE)


MEMORY = """
import sys
import numpy as np, psutil
from exporter.bundle import Bundle
from exporter.engines import open_session
def own():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
with open_session(Bundle.open(sys.argv[1]), "g6.grouped", capacity=2048, threads=1) as session:
    session.prefill([np.arange(1, 9)])
    before = own()
    for _ in range(2):
        session.reset()
        session.prefill([np.arange(2048) % 66 + 1])
    print(own() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory as Linux counts it")
def test_the_encoder_gives_its_memory_back(bundles: dict[str, Bundle]) -> None:
    """The scores of a long input take far more than all else; they are not held until the next one."""
    command = [sys.executable, "-c", MEMORY, bundles["static"].path]  # a process that has no memory of other tests
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 4 * 6 * 2048**2 / 2


def test_what_a_session_refuses(bundles: dict[str, Bundle]) -> None:
    with open_session(bundles["concat"], "g2.grouped", capacity=20, threads=1) as session:
        assert isinstance(session, Seq2SeqSession)
        with pytest.raises(EngineError, match="decodes after an input; give it one with prefill"):
            session.decode(np.array([1]))
        with pytest.raises(EngineError, match="input 1 of the encoder has 41 tokens, the capacity is 20; raise --capacity"):
            session.prefill(SOURCES[:1])
        session.prefill(SOURCES[1:])
        with pytest.raises(EngineError, match="reads its input at once; reset the session before the next input"):
            session.prefill(SOURCES[1:])
        for _ in range(11):
            session.decode(np.array([3]))
        with pytest.raises(EngineError, match="the cache is full: 20 tokens a sequence"):
            session.decode(np.array([3]))


def test_what_export_refuses(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(t5.save("t5", tmp_path))
    for options, message in (
        (ExportOptions(patterns=("fused",), cache="concat"), "pattern fused does not fit this model: its cache is concat"),
        (ExportOptions(patterns=("fused",), cache_dtype="int8"), "caches of an encoder-decoder are stored in --dtype"),
        (ExportOptions(dtype="fp16"), "fp16 is too narrow for the feed-forward layers of a T5"),
        (ExportOptions(groups=(4,)), "4 KV heads do not divide 6 query heads"),
    ):
        with pytest.raises(UserError, match=message):
            export(checkpoint, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_the_bundle_knows_all_its_graphs(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["concat"]
    variant = bundle.variant("g2.gqa")
    assert variant.graphs == ("encoder_model.g2.gqa.onnx", "decoder_model.g2.gqa.onnx", "decoder_with_past_model.g2.gqa.onnx")
    assert Bundle.open(bundle.path).variants == bundle.variants
    for path in bundle.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / variant.graphs[0]).unlink()
    with pytest.raises(BundleError, match=r"it names encoder_model\.g2\.gqa\.onnx, which .* lacks"):
        Bundle.open(tmp_path)


def test_weight_bytes_are_a_steps(bundles: dict[str, Bundle]) -> None:
    """Two decoder layers without what cross-attention's caches are made with, the last norm, the bias, and the head."""
    attention = 2 * 48 * 48 + 2 * 48 * 16  # self-attention: q, o, and k, v of 2 heads of 8
    layer = attention + 2 * 48 * 48 + 3 * 48 * 40 + 3 * 48
    assert bundles["static"].variant("g2.grouped").weight_bytes == 4 * (2 * layer + 48 + 8 * 6 + 67 * 48)
