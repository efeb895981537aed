"""Quality of a model from teacher-forced logits: cross-entropy of a text, agreement with a reference model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from exporter.engines.base import Session
from exporter.engines.seq2seq import Seq2SeqSession
from exporter.errors import EngineError, UserError
from exporter.generate import check_logits

LogitsFunction = Callable[[np.ndarray], np.ndarray]  # int64 [1, n] → logits [1, n, V]
Progress = Callable[[int, int], None]  # tokens scored, tokens in all


@dataclass(frozen=True)
class CrossEntropy:
    """Mean −ln p(token | tokens before it) in nats a token, over `tokens` predicted tokens."""

    nats_per_token: float
    tokens: int


@dataclass(frozen=True)
class Agreement:
    """Over `positions` of the same text: the share where both models' most likely next token is the same, and the mean
    KL(reference ‖ model) of their next-token distributions in nats."""

    same_token: float
    mean_kl: float
    positions: int


def default_text() -> str:
    """English prose and code that every Python has: the language reference in `pydoc_data.topics`, about 700 kB."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def cross_entropy(
    model: Session | LogitsFunction, tokens: np.ndarray, window: int = 1024, stride: int = 512, progress: Progress | None = None
) -> CrossEntropy:
    """Cross-entropy of `tokens` (int64 [n]) in windows of `window` tokens, each `stride` after the one before.

    Every token but the first is predicted once, from the start of the first window that holds it: with at least
    window − stride tokens before it, past the first window. A session must be of batch 1; it is reset first.

    An encoder-decoder reads in its encoder what comes before the predicted tokens of a window, and predicts none of the first
    window − stride tokens of the text.
    """
    if not 1 <= stride < window:
        raise UserError(f"stride {stride} is not from 1 to window − 1 = {window - 1}")
    check_text(tokens)
    if isinstance(model, Session) and window - 1 > model.capacity:
        raise EngineError(f"a window of {window} tokens needs {window - 1} cache rows, the capacity is {model.capacity}")
    first = min(window - stride, len(tokens) - 1) if isinstance(model, Seq2SeqSession) else 1
    total, predicted = 0.0, first
    for start in range(0, len(tokens), stride):
        part = tokens[start : start + window]
        scores = _positions(model, part[:-1], predicted - start - 1)
        for target, row in zip(tokens[predicted : start + len(part)], scores, strict=True):
            total -= _log_softmax(row)[target]
            predicted += 1
            if progress:
                progress(predicted - first, len(tokens) - first)
        if predicted == len(tokens):
            break
    return CrossEntropy(float(total) / (len(tokens) - first), len(tokens) - first)


def agreement(
    model: Session | LogitsFunction,
    reference: Session | LogitsFunction,
    windows: list[np.ndarray],
    progress: Progress | None = None,
) -> Agreement:
    """Both models read the same `windows` (each int64 [n]), each from an empty cache, and predict after every token.

    Encoder-decoders read the first half of each in their encoders, and predict from there on.
    """
    if not windows:
        raise UserError("agreement needs at least one window of tokens")
    same, divergence, done = 0, 0.0, 0
    halved = isinstance(model, Seq2SeqSession) or isinstance(reference, Seq2SeqSession)
    skips = [(len(window) - 1) // 2 if halved else 0 for window in windows]
    count = sum(map(len, windows)) - sum(skips)
    for window, skip in zip(windows, skips, strict=True):
        check_text(window, 1)
        for row, other in zip(_positions(model, window, skip), _positions(reference, window, skip), strict=True):
            if row.shape != other.shape:
                raise EngineError(f"the models have vocabularies of {len(row)} and {len(other)} tokens; they must be the same")
            mine, theirs = _log_softmax(row), _log_softmax(other)
            same += int(mine.argmax() == theirs.argmax())
            divergence += float(np.exp(theirs) @ (theirs - mine))
            done += 1
            if progress:
                progress(done, count)
    return Agreement(same / done, divergence / done, done)


def cut(tokens: np.ndarray, window: int, limit: int) -> list[np.ndarray]:
    """`limit` windows of `window` tokens, evenly spread over `tokens` (fewer where it is short)."""
    if window < 1 or limit < 1:
        raise UserError(f"{limit} windows of {window} tokens: both are whole numbers from 1")
    check_text(tokens, min(window, 2))
    window = min(window, len(tokens))
    limit = min(limit, len(tokens) // window)
    starts = np.linspace(0, len(tokens) - window, limit).astype(np.int64)
    return [tokens[start : start + window] for start in starts]


def _positions(model: Session | LogitsFunction, tokens: np.ndarray, skip: int) -> Iterator[np.ndarray]:
    """Logits [V] after each of `tokens` from number `skip` on."""
    if isinstance(model, Session):
        if model.batch != 1:
            raise EngineError(f"evaluation needs a session of batch 1, got {model.batch}")
        model.reset()
        blocks = model.score(tokens[None], skip)
    else:
        blocks = iter([model(tokens[None])[:, skip:]])
    for block in blocks:
        check_logits(block)
        yield from block[0]


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def check_text(tokens: np.ndarray, least: int = 2) -> None:
    """Refuse a text of fewer than `least` tokens: the first has none before it to be predicted from."""
    if tokens.ndim != 1 or len(tokens) < least:
        raise UserError(f"the text has {tokens.size} of the at least {least} tokens that are needed")
