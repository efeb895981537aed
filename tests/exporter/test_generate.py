"""Sampling against transformers' logits processors; generation and evaluation against the torch model written out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from exporter.checkpoint import Checkpoint
from exporter.engines import open_session
from exporter.engines.base import Session, SessionInfo
from exporter.engines.torch_eager import TorchSession, open_torch
from exporter.errors import EngineError, UserError
from exporter.evaluate import agreement, cross_entropy, cut, default_text
from exporter.generate import ENDED, GREEDY, Sampler, generate
from exporter.models.decoder import Decoder
from exporter.weights import ComputedTensor


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny.decoder()


# Sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_warping_is_transformers(temperature: float, top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(2).normal(0, 3, (4, 200)).astype(np.float32)
    expected = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))  # type: ignore[arg-type]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    sampler = Sampler(temperature, top_k, top_p)
    expected = expected - expected.max(dim=1, keepdim=True).values  # of which the probabilities are the same
    np.testing.assert_allclose(np.stack([sampler.warp(row) for row in logits]), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
def test_a_tiny_temperature_draws_the_likeliest(temperature: float) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (3, 200)).astype(np.float32)
    sampler = Sampler(temperature, seed=1, top_p=0.9)
    assert sampler.pick(logits, sampler.streams(3)).tolist() == logits.argmax(axis=1).tolist()


def test_tokens_are_drawn_as_often_as_their_probability() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    sampler = Sampler(1.0, seed=4)
    streams = sampler.streams(1)
    counts = np.bincount([int(sampler.pick(logits, streams)[0]) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)  # 4 standard deviations


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    logits = np.random.default_rng(3).normal(size=(3, 50)).astype(np.float32)
    sampler = Sampler(1.0, seed=9)
    alone, together = sampler.streams(1), sampler.streams(3)
    for _ in range(10):
        assert sampler.pick(logits[:1], alone)[0] == sampler.pick(logits, together)[0]
    assert GREEDY.pick(logits, GREEDY.streams(3)).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is not a number from 0"),
        ({"temperature": float("nan")}, "temperature nan is not a number from 0"),
        ({"top_k": -3}, "top-k -3 is not a whole number from 0"),
        ({"top_p": 0.0}, r"top-p 0.0 is outside \(0, 1\]"),
        ({"seed": -1}, "seed -1 is not a whole number from 0 on"),
    ],
)
def test_sampling_mistakes(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(**changes)  # type: ignore[arg-type]


# The torch session


def as_checkpoint(model: Decoder) -> Checkpoint:
    names = {"prologue.": "model.", "epilogue.": "model.", "layers.": "model.layers."}
    weights = {}
    for key, value in model.state_dict().items():
        name = next(new + key.removeprefix(old) for old, new in names.items() if key.startswith(old))
        weights[name] = ComputedTensor(name, value.dtype, tuple(value.shape), lambda value=value: value.clone())
    return Checkpoint("tiny", model.config, weights, {}, (), {})


def test_the_torch_session_follows_whole_sequences(model: Decoder) -> None:
    random = np.random.default_rng(0)
    with open_torch(as_checkpoint(model), batch=3, capacity=90, chunk=16) as session:
        assert session.info.backend == "torch"
        rows = [np.zeros(0, np.int64)] * 3
        for lengths in ((5, 37, 1), (20, 2, 9), (4, 4, 4), (1, 1, 1)):
            prompts = [random.integers(0, 61, n) for n in lengths]
            rows = [np.concatenate(pair) for pair in zip(rows, prompts, strict=True)]
            logits = session.decode(np.concatenate(prompts)) if lengths == (1, 1, 1) else session.prefill(prompts)
            expected = np.stack([tiny.full_logits(model, row)[-1] for row in rows])
            np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
        session.rewind(10)
        assert session.kv_bytes() == 30 * 5 * 32 * 4
        logits = session.decode(np.array([1, 2, 3]))
        expected = np.stack(
            [tiny.full_logits(model, np.append(row[:10], t))[-1] for row, t in zip(rows, (1, 2, 3), strict=True)]
        )
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


def test_torch_session_mistakes(model: Decoder) -> None:
    checkpoint = as_checkpoint(model)
    with pytest.raises(EngineError, match="dtype 'int8' is not one of fp32, fp16, bf16"):
        open_torch(checkpoint, dtype="int8")
    with pytest.raises(EngineError, match="capacity 0 is not a whole number from 1"):
        open_torch(checkpoint, capacity=0)
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="finds no CUDA device; choose device cpu"):
            open_torch(checkpoint, device="cuda")
    session = open_torch(checkpoint, capacity=4)
    with pytest.raises(EngineError, match="the prompt needs 5 cache rows, the capacity is 4"):
        session.prefill([np.arange(5)])


# Generation


def greedy(model: Decoder, prompt: np.ndarray, count: int) -> list[int]:
    row = prompt
    for _ in range(count):
        row = np.append(row, tiny.full_logits(model, row)[-1].argmax())
    return row[len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_greedy_generation(backend: str, model: Decoder, tmp_path: Path) -> None:
    prompts = [np.arange(3, 9), np.arange(40, 57)]
    session = (
        TorchSession(model, 2, 60) if backend == "torch" else open_session(tiny.bundle(tmp_path, model), batch=2, capacity=60)
    )
    tokens = np.stack(list(generate(session, prompts, 20)), axis=1)
    assert tokens.tolist() == [greedy(model, prompt, 20) for prompt in prompts]


def test_a_sequence_ends_with_its_stop_token_and_the_others_go_on(model: Decoder) -> None:
    prompts = [np.arange(3, 9), np.arange(40, 57)]
    expected = [greedy(model, prompt, 20) for prompt in prompts]
    stop = next(token for token in expected[0] if token not in expected[1])
    at = expected[0].index(stop)
    session = TorchSession(model, 2, 60)
    tokens = np.stack(list(generate(session, prompts, 20, stop_ids=[stop])), axis=1)
    assert tokens[0].tolist() == expected[0][: at + 1] + [ENDED] * (19 - at)
    assert tokens[1].tolist() == expected[1]
    session = TorchSession(model, 1, 60)
    assert len(list(generate(session, prompts[:1], 20, stop_ids=[stop]))) == at + 1


def test_tokens_come_one_by_one(model: Decoder) -> None:
    session = TorchSession(model, 1, 60)
    stream = generate(session, [np.arange(5)], 10)
    next(stream)
    assert session.lengths.tolist() == [5]
    next(stream)
    assert session.lengths.tolist() == [6]


def test_generation_that_does_not_fit_is_refused_before_it_starts(model: Decoder) -> None:
    session = TorchSession(model, 1, 30)
    assert len(list(generate(session, [np.arange(11)], 20))) == 20  # 11 + 20 − 1 rows
    session.reset()
    with pytest.raises(EngineError, match="a prompt of 12 tokens and 20 new ones need 31 cache rows, the capacity is 30"):
        generate(session, [np.arange(12)], 20)
    assert session.lengths.tolist() == [0]
    with pytest.raises(UserError, match="max-new-tokens 0 is not a whole number from 1"):
        generate(session, [np.arange(3)], 0)


class Fixed(Session):
    """Gives the same logits whatever it is fed."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__(tiny.CONFIG, 1, 400, SessionInfo("fixed", "cpu", {}, {}))
        self.logits = logits

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.check_prompts(prompts)
        self.lengths += len(prompts[0])
        return self.logits[None]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.check_decode(tokens)
        self.lengths += 1
        return self.logits[None]

    def rewind(self, length: int) -> None:
        self.lengths[:] = length

    def _kv_token_bytes(self) -> int:
        return 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits = np.zeros(61, np.float32)
    logits[7] = bad
    for sampler in (GREEDY, Sampler(1.0)):
        with pytest.raises(EngineError, match="logits are not finite numbers"):
            next(generate(Fixed(logits), [np.arange(3)], 5, sampler))
    with pytest.raises(EngineError, match="logits are not finite numbers"):
        cross_entropy(Fixed(logits), np.arange(9), 8, 4)


# Evaluation


def reference_nats(model: Decoder, tokens: np.ndarray, window: int, stride: int) -> float:
    """Each token with the windows written out: the first window that holds it."""
    total = 0.0
    for index in range(1, len(tokens)):
        start = 0
        while start + window <= index:
            start += stride
        logits = torch.from_numpy(tiny.full_logits(model, tokens[start:index])[-1]).double()
        total -= torch.log_softmax(logits, 0)[tokens[index]].item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize(("length", "window", "stride"), [(90, 32, 16), (90, 200, 100), (33, 32, 31), (2, 8, 4), (65, 32, 1)])
def test_cross_entropy(length: int, window: int, stride: int, model: Decoder) -> None:
    tokens = np.random.default_rng(6).integers(0, 61, length)
    expected = reference_nats(model, tokens, window, stride)
    seen: list[tuple[int, int]] = []
    result = cross_entropy(TorchSession(model, 1, 400, chunk=8), tokens, window, stride, lambda *step: seen.append(step))
    assert result.tokens == length - 1
    assert result.nats_per_token == pytest.approx(expected, abs=1e-5)
    assert seen == [(done, length - 1) for done in range(1, length)]

    def function(ids: np.ndarray) -> np.ndarray:
        return tiny.full_logits(model, ids[0])[None]

    assert cross_entropy(function, tokens, window, stride).nats_per_token == pytest.approx(expected, abs=1e-5)


def test_cross_entropy_through_a_last_position_graph(model: Decoder, tmp_path: Path) -> None:
    tokens = np.random.default_rng(6).integers(0, 61, 80)
    with open_session(tiny.bundle(tmp_path, model), threads=1) as session:
        assert cross_entropy(session, tokens, 32, 16).nats_per_token == pytest.approx(
            reference_nats(model, tokens, 32, 16), abs=1e-5
        )


def test_agreement(model: Decoder) -> None:
    other = Decoder(model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    other.layers[1].self_attn.v_proj.weight.mul_(0.5)  # type: ignore[union-attr, operator]
    windows = cut(np.random.default_rng(7).integers(0, 61, 100), 30, 3)
    assert [len(window) for window in windows] == [30, 30, 30]
    same = agreement(TorchSession(model, 1, 400), TorchSession(model, 1, 400, chunk=7), windows)
    assert same.same_token == 1
    assert same.positions == 90
    assert abs(same.mean_kl) < 1e-7

    result = agreement(TorchSession(other, 1, 400), TorchSession(model, 1, 400), windows)
    mine, theirs = (
        torch.log_softmax(torch.from_numpy(np.concatenate([tiny.full_logits(m, w) for w in windows])).double(), -1)
        for m in (other, model)
    )
    assert result.same_token == pytest.approx((mine.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    expected = torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean").item()
    assert result.mean_kl == pytest.approx(expected, rel=1e-4)
    assert result.same_token < 1
    assert result.mean_kl > 0.01


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    result = cross_entropy(Fixed(np.zeros(61, np.float32)), np.arange(50), 16, 8)
    assert result.nats_per_token == pytest.approx(np.log(61))


def test_evaluation_mistakes(model: Decoder) -> None:
    session = TorchSession(model, 1, 20)
    tokens = np.arange(50)
    with pytest.raises(UserError, match="stride 8 is not from 1 to window − 1 = 7"):
        cross_entropy(session, tokens, 8, 8)
    with pytest.raises(UserError, match="the text has 1 of the at least 2 tokens that are needed"):
        cross_entropy(session, tokens[:1])
    with pytest.raises(EngineError, match="a window of 1024 tokens needs 1023 cache rows, the capacity is 20"):
        cross_entropy(session, tokens)
    with pytest.raises(EngineError, match="evaluation needs a session of batch 1, got 2"):
        cross_entropy(TorchSession(model, 2, 20), tokens, 8, 4)
    with pytest.raises(UserError, match="agreement needs at least one window"):
        agreement(session, session, [])
    with pytest.raises(EngineError, match="vocabularies of 3 and 61 tokens"):
        agreement(lambda ids: np.zeros((1, ids.shape[1], 3)), session, [tokens[:5]])


def test_windows_are_spread_over_the_text() -> None:
    tokens = np.arange(100)
    starts = [int(window[0]) for window in cut(tokens, 10, 4)]
    assert starts == [0, 30, 60, 90]
    assert len(cut(tokens, 30, 50)) == 3
    assert [len(window) for window in cut(tokens, 500, 2)] == [100]


def test_the_default_text_is_english_of_some_length() -> None:
    text = default_text()
    assert len(text) > 300_000
    assert 'The "for" statement' in text or "for_stmt" in text


def test_scoring_is_lazy(model: Decoder) -> None:
    session = TorchSession(model, 1, 400, chunk=8)
    blocks: Iterator[np.ndarray] = session.score(np.arange(40)[None])
    next(blocks)
    assert session.lengths.tolist() == [8]
    with pytest.raises(EngineError, match="score cannot skip 40 of 40 tokens"):
        next(session.score(np.arange(40)[None], 40))
    with pytest.raises(EngineError, match=r"score takes tokens of shape \[batch, length\], got \[40\]"):
        next(session.score(np.arange(40)))
