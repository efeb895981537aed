"""Sessions over engines that ONNX Runtime stands in for: what TensorRT is given computes what transformers and torch do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json

import fake_gpu
import numpy as np
import pytest
import t5
import tiny
import torch
from transformers import AutoModelForSeq2SeqLM

from exporter.bundle import MANIFEST, Bundle
from exporter.checkpoint import open_checkpoint, write_checkpoint
from exporter.convert import convert_weights
from exporter.engines import open_session
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.engines.tensorrt.seq2seq_session import TensorRTSeq2SeqSession
from exporter.errors import EngineError
from profiles import bundles
from profiles.bandwidth import BandwidthProbe
from profiles.measure import Plan
from profiles.report import render
from profiles.results import Results

BACKEND = "tensorrt-rtx"
OPTIONS = BuildOptions(targets=("sm86", "sm89"), batch=2, capacity=60, prefill=41)
SOURCES = [np.arange(41) * 7 % 67, np.arange(9) * 5 % 67]  # 0, which also fills up the shorter one, among them
TARGETS = np.concatenate([np.zeros((2, 1), np.int64), np.random.default_rng(0).integers(1, 67, (2, 18))], axis=1)
TOLERANCE = 2e-4  # absolute, on logits of about ±10


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model with two KV heads repeated three times each."""
    folder = tmp_path_factory.mktemp("theirs")
    checkpoint = open_checkpoint(t5.save("t5-wide", folder))
    few = convert_weights(checkpoint.config, checkpoint.weights, 2)
    config, weights = convert_weights(*few, 6)
    write_checkpoint(dataclasses.replace(checkpoint, config=config, weights=weights), folder / "repeated")
    return AutoModelForSeq2SeqLM.from_pretrained(folder / "repeated").eval()


def expected(model, sources) -> np.ndarray:
    """float32 [n, STEPS, V], each sequence alone."""
    with torch.no_grad():
        rows = [
            model(input_ids=torch.from_numpy(source)[None], decoder_input_ids=torch.from_numpy(target)[None]).logits
            for source, target in zip(sources, TARGETS, strict=True)
        ]
    return torch.cat(rows).numpy()


def decoded(session: TensorRTSeq2SeqSession, sources) -> np.ndarray:
    found = [session.prefill(sources).copy(), *(session.decode(tokens).copy() for tokens in TARGETS.T[1:])]
    return np.stack(found, axis=1)


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_an_encoder_decoders_logits(pattern, captures, pair, theirs, monkeypatch):
    """Unequal inputs in a batch; then shorter ones, whose shapes are others; then back to a step before."""
    fake_gpu.build_fakes(pair, dataclasses.replace(OPTIONS, variants=(f"g2.{pattern}",)))
    engines = fake_gpu.install(monkeypatch, (41, 1), captures)
    with open_session(pair, f"g2.{pattern}", backend=BACKEND, batch=2, capacity=60) as session:
        assert isinstance(session, TensorRTSeq2SeqSession)
        np.testing.assert_allclose(decoded(session, SOURCES), expected(theirs, SOURCES), rtol=0, atol=TOLERANCE)
        assert session.lengths.tolist() == [41 + 18, 9 + 18]
        assert [engine.ran for engine in engines] == [1, 19]  # the encoder once an input, the decoder once a token
        session.reset()
        short = [SOURCES[0][:7], SOURCES[1][:5]]
        wanted = expected(theirs, short)
        np.testing.assert_allclose(decoded(session, short), wanted, rtol=0, atol=TOLERANCE)
        session.reset()
        session.prefill(short[::-1])
        session.decode(TARGETS[:, 3])
        session.reset()
        np.testing.assert_allclose(decoded(session, short), wanted, rtol=0, atol=TOLERANCE)
        session.reset()
        with pytest.raises(EngineError, match=r"input 2 of the encoder has 42 tokens, its engine takes 41; .*--prefill 42"):
            session.prefill([SOURCES[0], np.ones(42, np.int64)])
        with pytest.raises(EngineError, match="decodes after an input"):
            session.decode(np.array([1, 1]))


def test_going_back_and_timing_layers(pair, theirs, monkeypatch, tmp_path):
    fake_gpu.build_fakes(pair, dataclasses.replace(OPTIONS, batch=1, variants=("g2.grouped",)))
    fake_gpu.install(monkeypatch, (41, 1), captures=True)
    session = open_session(pair, "g2.grouped", backend=BACKEND, capacity=60, profile_to=tmp_path / "times")
    session.prefill(SOURCES[:1])
    for token in (5, 6, 7):
        session.decode(np.array([token]))
    session.rewind(41)
    found = [session.decode(TARGETS[:1, step]).copy() for step in range(1, 6)]
    wanted = expected(theirs, SOURCES)[0, 1:6]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=TOLERANCE)
    session.close()
    assert session.profile.name == "times.layers.json"
    told = json.loads(session.profile.read_text())
    assert told == {"calls": [fake_gpu.LAYERS] * 9, "nodes": {name: fake_gpu.NODES.get(name, "") for name in fake_gpu.LAYERS}}


def test_the_encoder_of_another_build_is_refused(pair, monkeypatch):
    """As where a build ended between the two: the pair must have one recipe."""
    built = fake_gpu.build_fakes(pair, dataclasses.replace(OPTIONS, variants=("g2.grouped",)))
    (encoder, decoder), folder = [item.record for item in built], built[0].folder
    assert record.encoder_of(pair, folder, decoder) == encoder
    other = dataclasses.replace(encoder, recipe=dataclasses.replace(encoder.recipe, prefill=7))
    words = r"no encoder's engine that was built as decoder.g2.grouped.b2.s60.engine was; make it again: headpool build .* g2"
    for left in ((other, decoder), (decoder,)):
        record.write(folder, left)
        fake_gpu.install(monkeypatch, (41, 1), captures=False)
        with pytest.raises(EngineError, match=words):
            open_session(pair, "g2.grouped", backend=BACKEND, batch=2, capacity=60)


def test_an_engine_that_cannot_be_captured_runs_call_by_call(decoder, tmp_path, monkeypatch):
    bundle = tiny.bundle(tmp_path, decoder, "attention")
    fake_gpu.build_fakes(bundle, BuildOptions(targets=("sm89",), capacity=40, prefill=8))
    (engine,) = [fake_gpu.install(monkeypatch, (8, 1), captures=True)]

    @contextlib.contextmanager
    def broken(_graph, stream):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr("torch.cuda.graph", broken)
    tokens = np.random.default_rng(1).integers(0, 61, 20)
    with open_session(Bundle(tmp_path, bundle.variants), backend=BACKEND, capacity=40) as session:
        session.prefill([tokens[:12]])
        found = [session.decode(tokens[at : at + 1]).copy() for at in range(12, 20)]
    np.testing.assert_allclose(np.concatenate(found), tiny.full_logits(decoder, tokens)[12:], rtol=0, atol=TOLERANCE)
    assert engine[0].ran == 2 + 8 + 1  # the prefill's calls, the steps, and what was tried


def test_figures_of_quantised_engines_are_of_their_weights(decoder, tmp_path):
    config = dataclasses.replace(tiny.CONFIG, hidden_size=96, intermediate_size=64)
    bundle = tiny.bundle(tmp_path, tiny.decoder(config), "attention", dtype="fp16")
    variant = dataclasses.replace(bundle.variants[0], weight_bytes=1_000_000)
    (built,) = fake_gpu.build_fakes(Bundle(tmp_path, (variant,)), BuildOptions(capacity=32, prefill=8, quantize="int4"))
    shapes = [
        (96, 96),
        (32, 96),
        (32, 96),
        (96, 96),
        (64, 96),
        (64, 96),
        (96, 64),
    ]  # of layer 0; layer 1 has 48 rows of K and V
    shapes += [(48, 96) if shape == (32, 96) else shape for shape in shapes]
    saved = sum(
        2 * rows * columns - rows * columns // 2 - 2 * rows * (columns // (64 if columns == 64 else 32))
        for rows, columns in shapes
    )
    assert built.record.weight_bytes == 1_000_000 - saved
    told = bundles.weights_of(Bundle(tmp_path, (variant,)), variant, "tensorrt-rtx", "int4")
    assert told == {"dtype": "fp16, int4 weights", "weight_bytes": 1_000_000 - saved}


def test_a_profile_has_the_time_of_each_layer(decoder, tmp_path, monkeypatch):
    """`headpool profile --backend tensorrt-rtx --breakdown 9`: classes, layers, and both in the report."""
    bundle = tiny.bundle(tmp_path, decoder, "attention")
    (tmp_path / MANIFEST).write_text(json.dumps(bundle.to_json()))
    monkeypatch.setattr(bundles, "BandwidthProbe", functools.partial(BandwidthProbe, array_bytes=8 << 20))
    fake_gpu.build_fakes(Bundle.open(tmp_path), BuildOptions(targets=("sm89",), capacity=64, prefill=16))
    fake_gpu.install(monkeypatch, (16, 1), captures=True)
    plan = Plan(contexts=(5, 9), kinds=("decode",), samples=2, burst=1, settle=1, warmup=1)
    results = bundles.profile_bundle([tmp_path], plan, backend=BACKEND, threads=1, breakdown=(9,))
    plain, timed = results.cells
    assert plain.layers is None
    assert plain.breakdown is None
    assert timed.layers == pytest.approx({name: ms * 1e-3 for name, ms in fake_gpu.LAYERS.items()})
    parts = {kind: seconds for kind, seconds in timed.breakdown.items() if kind != "runtime"}
    assert parts == pytest.approx({"matmul": 1e-6, "attention": 2e-6, "other": 0.25e-6})
    assert timed.breakdown["runtime"] > 0
    page = render([Results.load(results.save(tmp_path / "results.json"))])
    assert page.index("Slowest layers") < page.index("_gemm_mha_myl0_2") < page.index("__myl_AddMean_myl0_3")
    assert "61.5%" in page


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_a_decoders_logits(logits, captures, decoder, tmp_path, monkeypatch):
    bundle = tiny.bundle(tmp_path, decoder, "attention", logits=logits)
    fake_gpu.build_fakes(bundle, BuildOptions(targets=("sm89",), batch=2, capacity=40, prefill=8))
    fake_gpu.install(monkeypatch, (8, 1), captures)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 30))
    wanted = np.stack([tiny.full_logits(decoder, row) for row in tokens])
    with open_session(Bundle(tmp_path, bundle.variants), backend=BACKEND, batch=2, capacity=40) as session:
        session.prefill([tokens[0, :20], tokens[1, :13]])
        session.rewind(13)
        found = [session.decode(column).copy() for column in tokens.T[13:18]]
        np.testing.assert_allclose(np.stack(found, axis=1), wanted[:, 13:18], rtol=0, atol=TOLERANCE)
        session.reset()
        scores = np.concatenate([part.copy() for part in session.score(tokens, 3)], axis=1)
        np.testing.assert_allclose(scores, wanted[:, 3:], rtol=0, atol=TOLERANCE)
