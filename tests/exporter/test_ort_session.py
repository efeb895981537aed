"""ONNX Runtime sessions on every pattern and cache form against the torch model run over whole sequences, row by row."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny

from exporter.bundle import Bundle, Variant
from exporter.cli import options
from exporter.engines import BACKENDS, open_session, providers
from exporter.engines import onnxruntime as ort
from exporter.engines.base import Session
from exporter.engines.ort_static import StaticSession, next_rows
from exporter.errors import BundleError, EngineError
from exporter.models.decoder import Decoder

FORMS = [("grouped", "static"), ("grouped", "concat"), ("attention", "static"), ("attention", "concat")]
FORMS += [("gqa", "static"), ("gqa", "concat"), ("repeat", "concat")]
TOLERANCE = 2e-4  # absolute, on logits of about ±10


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny.decoder()


@pytest.fixture(scope="module")
def bundles(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {(pattern, cache): tiny.bundle(folder, model, pattern, cache) for pattern, cache in FORMS}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def static_all(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny.bundle(tmp_path_factory.mktemp("all"), model, logits="all")


class Mirror:
    """What each sequence holds, beside a session, with the torch model as the judge."""

    def __init__(self, session: Session, model: Decoder) -> None:
        self.session, self.model = session, model
        self.rows: list[np.ndarray] = [np.zeros(0, np.int64)] * session.batch
        self.random = np.random.default_rng(0)

    def tokens(self, count: int) -> np.ndarray:
        return self.random.integers(0, tiny.CONFIG.vocab_size, count)

    def prefill(self, *counts: int) -> None:
        prompts = [self.tokens(count) for count in counts]
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, prompts, strict=True)]
        self.check(self.session.prefill(prompts))

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            tokens = self.tokens(self.session.batch)
            self.rows = [np.append(row, token) for row, token in zip(self.rows, tokens, strict=True)]
            self.check(self.session.decode(tokens))

    def rewind(self, length: int) -> None:
        self.session.rewind(length)
        self.rows = [row[:length] for row in self.rows]

    def one_sequence(self) -> None:
        """In a session of batch 1, chunks of 16 tokens and 300 rows."""
        self.prefill(40)  # three chunks
        self.decode(30)  # past row 64, where the static cache grows
        self.prefill(7)
        self.rewind(33)
        self.decode(2)
        self.rewind(0)
        self.prefill(1)
        self.decode(2)
        assert self.session.kv_bytes() == 3 * 5 * (16 + self.model.config.value_dim) * 4

    def unequal_lengths(self) -> None:
        """In a session of batch 3, chunks of 16 tokens and 120 rows."""
        self.prefill(5, 37, 1)
        self.decode(3)
        self.prefill(20, 2, 9)  # again unequal, on top of unequal lengths
        self.decode(2)
        self.rewind(13)
        self.decode(2)
        self.prefill(4, 4, 4)
        self.session.reset()
        self.rows = [row[:0] for row in self.rows]
        self.prefill(3, 3, 3)
        self.decode(1)

    def check(self, logits: np.ndarray) -> None:
        assert logits.dtype == np.float32
        assert self.session.lengths.tolist() == [len(row) for row in self.rows]
        expected = np.stack([tiny.full_logits(self.model, row)[-1] for row in self.rows])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_one_sequence(form: tuple[str, str], bundles: dict[tuple[str, str], Bundle], model: Decoder) -> None:
    with open_session(bundles[form], capacity=300, threads=1, chunk=16) as session:
        Mirror(session, model).one_sequence()


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_unequal_lengths_in_a_batch(form: tuple[str, str], bundles: dict[tuple[str, str], Bundle], model: Decoder) -> None:
    with open_session(bundles[form], batch=3, capacity=120, threads=1, chunk=16) as session:
        Mirror(session, model).unequal_lengths()


@pytest.mark.parametrize("form", [("grouped", "static"), ("grouped", "concat")], ids="-".join)
def test_every_row_of_the_capacity_can_be_used_and_no_more(
    form: tuple[str, str], bundles: dict[tuple[str, str], Bundle], model: Decoder
) -> None:
    with open_session(bundles[form], batch=2, capacity=50, threads=1, chunk=16) as session:
        mirror = Mirror(session, model)
        mirror.prefill(44, 3)
        mirror.prefill(5, 46)  # row 0 is almost full: a pad must not be written past its end
        mirror.decode(1)
        assert session.lengths.tolist() == [50, 50]
        with pytest.raises(EngineError, match="the cache is full: 50 tokens a sequence; raise --capacity"):
            session.decode(np.array([1, 2]))
        session.rewind(10)
        with pytest.raises(EngineError, match="prompt 2 needs 51 cache rows, the capacity is 50; raise --capacity"):
            session.prefill([np.ones(1, np.int64), np.ones(41, np.int64)])
        assert session.lengths.tolist() == [10, 10]


def test_the_static_cache_grows_in_steps_and_keeps_to_its_capacity(bundles: dict[tuple[str, str], Bundle]) -> None:
    with open_session(bundles["grouped", "static"], capacity=200, threads=1) as session:
        assert isinstance(session, StaticSession)
        assert session.rows == 0
        sizes = []
        session.prefill([np.ones(5, np.int64)])
        for _ in range(195):
            session.decode(np.ones(1, np.int64))
            sizes.append(session.rows)
        assert sorted(set(sizes)) == [64, 128, 192, 200]


@pytest.mark.parametrize("pattern", ["grouped", "gqa"])
def test_rows_follow_the_context_down(
    pattern: str, bundles: dict[tuple[str, str], Bundle], model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rewind that leaves few of them; what is held stays. A few tokens taken back and fed again move nothing."""
    with open_session(bundles[pattern, "static"], batch=2, capacity=300, threads=1) as session:
        assert isinstance(session, StaticSession)
        mirror = Mirror(session, model)
        mirror.prefill(290, 200)
        mirror.rewind(20)
        assert session.rows == 128
        mirror.decode(3)
        mirror.prefill(30, 5)
        mirror.prefill(180, 205)
        monkeypatch.setattr(session, "_resize", None)
        mirror.rewind(220)
        mirror.decode(3)


def test_growth_copies_few_rows_and_leaves_few_unread() -> None:
    rows = copied = 0
    for need in range(1, 100_001):
        if need > rows:
            grown = next_rows(need, rows, 100_000)
            copied, rows = copied + need - 1, grown
            assert need <= grown <= max(need + need // 16 + 128, 64)
    assert rows == 100_000
    assert copied <= 17 * 100_000
    assert next_rows(512, 0, 9000, ahead=4097) == 512
    assert next_rows(1024, 512, 9000, ahead=4097) == 1024
    assert next_rows(2560, 2048, 9000, ahead=4097) == 4160
    assert next_rows(512, 0, 9000, ahead=513) == 576


def test_present_is_written_in_the_buffer_that_past_is_read_from(bundles: dict[tuple[str, str], Bundle]) -> None:
    for pattern in ("grouped", "attention", "gqa"):
        with open_session(bundles[pattern, "static"], capacity=64, threads=1) as session:
            assert isinstance(session, StaticSession)
            buffer = next(iter(session._caches.values()), None)
            assert buffer is None  # nothing is allocated before the first token
            session.prefill([np.arange(9)])
            keys = next(iter(session._caches.values())).to_host()
            assert np.abs(keys[:, :, :9]).min() > 0
            assert not keys[:, :, 9:].any()


@pytest.mark.parametrize("form", [("grouped", "static"), ("gqa", "static")], ids="-".join)
def test_half_precision(form: tuple[str, str], model: Decoder, tmp_path: Path) -> None:
    opened = tiny.bundle(tmp_path, model, form[0], form[1], dtype="fp16")  # type: ignore[arg-type]
    with open_session(opened, batch=2, capacity=100, threads=1) as session:
        rows = [np.arange(3, 30), np.arange(20, 28)]
        logits = session.prefill(rows)
        expected = np.stack([tiny.full_logits(model, row)[-1] for row in rows])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tiny.HALF)
        token = logits.argmax(1)
        expected = np.stack([tiny.full_logits(model, np.append(row, t))[-1] for row, t in zip(rows, token, strict=True)])
        np.testing.assert_allclose(session.decode(token), expected, rtol=0, atol=tiny.HALF)
        session.rewind(5)
        assert session.kv_bytes() == 2 * 5 * 5 * 32 * 2


def test_a_dtype_without_kernels_is_one_line(model: Decoder, tmp_path: Path) -> None:
    opened = tiny.bundle(tmp_path, model, "attention", dtype="bf16")
    with pytest.raises(EngineError, match=r"cannot run .*bf16.* on CPUExecutionProvider") as caught:
        open_session(opened)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip", [0, 5, 18, 40])
def test_scores_of_all_positions(skip: int, static_all: Bundle, bundles: dict[tuple[str, str], Bundle], model: Decoder) -> None:
    tokens = np.random.default_rng(1).integers(0, 61, (2, 41))
    expected = np.stack([tiny.full_logits(model, row)[skip:] for row in tokens])
    for opened in (static_all, bundles["grouped", "static"], bundles["repeat", "concat"]):
        with open_session(opened, batch=2, threads=1, chunk=16) as session:
            logits = np.concatenate([block.copy() for block in session.score(tokens, skip)], axis=1)
            np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
            assert session.lengths.tolist() == [41, 41]


def test_all_logits_prefill_and_decode(static_all: Bundle, model: Decoder) -> None:
    with open_session(static_all, batch=2, threads=1, chunk=8) as session:
        mirror = Mirror(session, model)
        mirror.prefill(20, 3)
        mirror.prefill(10, 10)
        mirror.decode(2)


def test_the_profile_is_written_where_it_was_asked_for(bundles: dict[tuple[str, str], Bundle], tmp_path: Path) -> None:
    session = open_session(bundles["grouped", "static"], threads=1, profile_to=tmp_path / "run")
    session.prefill([np.arange(3)])
    session.decode(np.ones(1, np.int64))
    session.close()
    session.close()
    (file,) = tmp_path.glob("run*")
    assert session.profile == file  # type: ignore[attr-defined]
    assert sum(event["name"] == "model_run" for event in json.loads(file.read_text())) == 2
    with pytest.raises(EngineError, match="folder that does not exist"):
        open_session(bundles["grouped", "static"], profile_to=tmp_path / "none" / "run")


def test_options_are_recorded(bundles: dict[tuple[str, str], Bundle]) -> None:
    with open_session(bundles["grouped", "static"], "v", threads=1, optimisation="basic") as session:
        assert session.info.backend == "onnxruntime"
        assert session.info.provider == "CPUExecutionProvider"
        assert session.info.options == {"threads": 1, "optimisation": "basic", "chunk": 512}
        assert session.capacity == 400
        assert set(session.info.versions) == {"onnxruntime"}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """ONNX Runtime's CPU as a provider that compiles engines, and what it is told each time."""
    told = list[dict[str, str]]()
    as_engines = dataclasses.replace(providers.PROVIDERS[providers.CPU], backend="onnxruntime-tensorrt", options="trt")
    monkeypatch.setitem(providers.PROVIDERS, providers.CPU, as_engines)

    def start(graph: Path, options: Any, name: str, own: dict[str, str]) -> Any:
        told.append(own)
        return onnxruntime.InferenceSession(graph, options, providers=[name])

    monkeypatch.setattr(ort, "start", start)
    return told


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_a_provider_that_compiles_engines_gets_fixed_sizes(pattern, bundles, compiling, model) -> None:  # type: ignore[no-untyped-def]
    """One batch and one capacity, whatever a session holds; a profile of one token to a chunk."""
    with open_session(bundles[pattern, "static"], capacity=300, chunk=16) as session:
        assert isinstance(session, StaticSession)
        assert [value.shape[2] for value in session.runtime.get_inputs()[2:]] == [300] * 4
        Mirror(session, model).one_sequence()
        assert session.rows == 300
    with open_session(bundles[pattern, "static"], batch=3, capacity=300, chunk=7) as session:
        Mirror(session, model).unequal_lengths()
    first, second = compiling
    assert first == {
        "trt_profile_min_shapes": "input_ids:1x1,position_ids:1x1",
        "trt_profile_opt_shapes": "input_ids:1x1,position_ids:1x1",
        "trt_profile_max_shapes": "input_ids:1x16,position_ids:1x16",
    }
    assert second["trt_profile_max_shapes"] == "input_ids:3x7,position_ids:3x7"


@pytest.mark.parametrize(
    ("version", "words"), [(None, "needs tensorrt 10, not here"), ("11.4", "needs tensorrt 10, here is 11.4: ")]
)
def test_the_provider_wants_the_tensorrt_it_was_built_for(version, words, bundles, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [providers.TENSORRT])
    monkeypatch.setitem(sys.modules, "tensorrt", None if version is None else SimpleNamespace(__version__=version))
    with pytest.raises(EngineError, match=f"backend onnxruntime-tensorrt {words}.*tensorrt-cu13>=10"):
        open_session(bundles["grouped", "static"], backend="onnxruntime-tensorrt")


def test_what_such_a_provider_cannot_take_is_refused(bundles, compiling) -> None:  # type: ignore[no-untyped-def]
    for pattern, cache in (("gqa", "static"), ("grouped", "concat")):
        words = rf"variant v \({pattern}, {cache} cache\) does not run on onnxruntime-tensorrt, which takes the patterns"
        with pytest.raises(EngineError, match=words):
            open_session(bundles[pattern, cache])
    assert not compiling


def test_user_mistakes(bundles: dict[tuple[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundles["grouped", "static"]
    with pytest.raises(EngineError, match="backend 'tpu' is not one of onnxruntime, onnxruntime-cuda"):
        open_session(opened, backend="tpu")
    with pytest.raises(BundleError, match="variant 'g9' is not one of v"):
        open_session(opened, "g9")
    for name in ("batch", "capacity", "threads", "chunk"):
        with pytest.raises(EngineError, match=f"{name} 0 is not a whole number from 1"):
            open_session(opened, **{name: 0})
    with pytest.raises(EngineError, match="optimisation 'max' is not one of none, basic, extended, all"):
        open_session(opened, optimisation="max")
    if "CUDAExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        with pytest.raises(EngineError, match=r"has no CUDAExecutionProvider .* pip install 'onnxruntime-gpu>=1\.31'"):
            open_session(opened, backend="onnxruntime-cuda")
        with pytest.raises(EngineError, match=r"has no TensorrtExecutionProvider .* 'tensorrt-cu13>=10\.15,<11'"):
            open_session(opened, backend="onnxruntime-tensorrt")
        with pytest.raises(
            EngineError, match=r"backend onnxruntime-tensorrt-rtx needs onnxruntime_ep\w+, which is not installed"
        ):
            open_session(opened, backend="onnxruntime-tensorrt-rtx")

    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    variant = Variant("v", "bad.onnx", tiny.CONFIG, "grouped", "static", "fp32", "last", (), 0)
    with pytest.raises(EngineError, match=r"cannot run .*bad\.onnx \(pattern grouped, fp32\)") as caught:
        open_session(Bundle(tmp_path, (variant,)))
    assert "\n" not in str(caught.value)

    with open_session(opened, batch=2, capacity=20) as session:
        with pytest.raises(EngineError, match="token id 61 is outside the vocabulary of 61"):
            session.prefill([np.array([1]), np.array([61])])
        with pytest.raises(EngineError, match="token id -1 is outside"):
            session.decode(np.array([-1, 0]))
        with pytest.raises(EngineError, match="1 prompts for a session of batch 2"):
            session.prefill([np.array([1])])
        with pytest.raises(EngineError, match="prompt 2 has no tokens"):
            session.prefill([np.array([1]), np.array([], np.int64)])
        with pytest.raises(EngineError, match=r"decode takes 2 tokens, one a sequence, got an array of shape \[1\]"):
            session.decode(np.array([1]))
        with pytest.raises(EngineError, match="cannot rewind to 1 tokens: the shortest sequence holds 0"):
            session.rewind(1)
        assert session.lengths.tolist() == [0, 0]

    with pytest.raises(
        EngineError, match="--engine-weights int4 is of the backends tensorrt and tensorrt-rtx, not of onnxruntime"
    ):
        open_session(opened, engine_weights="int4")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for module in ("exporter.engines.onnxruntime", "exporter.engines.ort_session", "exporter.engines.ort_static"):
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        EngineError, match="backend onnxruntime needs onnxruntime, which is not installed: pip install onnxruntime"
    ):
        open_session(opened)
    assert tuple(BACKENDS) == options.BACKENDS
