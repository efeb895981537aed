"""Sampling the next token from logits, and generation as a stream. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from exporter.engines.base import Session
from exporter.errors import EngineError, UserError

ENDED = -1  # the token of a sequence that has met a stop token


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn. Temperature 0 is greedy: the most likely token, the first one among equals.

    Else logits are divided by `temperature`, all but the `top_k` largest are dropped (0: none), then all but the smallest set
    whose probabilities sum to `top_p` or more (1: none; Holtzman et al. 2019, arXiv 1904.09751, section 3.1), and a token is
    drawn. Sequence b draws from a stream of its own, (seed, b), so what it gets does not depend on how many there are.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature} is not a number from 0 (greedy) on")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is not a whole number from 0 (all tokens) on")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside (0, 1]")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is not a whole number from 0 on")

    def streams(self, batch: int) -> list[np.random.Generator]:
        """One random stream a sequence."""
        return [np.random.default_rng([self.seed, row]) for row in range(batch)]

    def pick(self, logits: np.ndarray, streams: list[np.random.Generator]) -> np.ndarray:
        """int64 [B] from float32 logits [B, V]. Raises EngineError when they are not numbers."""
        check_logits(logits)
        if self.temperature == 0:
            return logits.argmax(axis=1)
        return np.array([self._draw(self.warp(row), stream) for row, stream in zip(logits, streams, strict=True)])

    def warp(self, logits: np.ndarray) -> np.ndarray:
        """float64 [V]: one sequence's logits, less the largest, after temperature, top-k and top-p; dropped tokens are −inf."""
        scores = logits.astype(np.float64)
        scores -= scores.max()  # so that a small temperature makes large numbers of none but the unlikely
        with np.errstate(over="ignore"):
            scores /= self.temperature
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p < 1:
            kept = np.flatnonzero(scores > -np.inf)
            order = kept[np.argsort(-scores[kept], kind="stable")]
            probabilities = np.exp(scores[order] - scores[order[0]])
            before = (probabilities.cumsum() - probabilities) / probabilities.sum()
            scores[order[before >= self.top_p]] = -np.inf
        return scores

    @staticmethod
    def _draw(scores: np.ndarray, stream: np.random.Generator) -> int:
        cumulative = np.exp(scores - scores.max()).cumsum()
        return int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))


GREEDY = Sampler()


def generate(
    session: Session,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    sampler: Sampler = GREEDY,
    stop_ids: Collection[int] = (),
) -> Iterator[np.ndarray]:
    """Feed B prompts (1-D int64) and yield int64 [B] for each new token, as soon as it is known.

    A sequence ends with the stop token it drew (which is yielded) and has ENDED from then on; the stream ends when all have,
    or after `max_new_tokens`. The last token is not fed. A batch goes in step, so that one which has ended takes in tokens that
    nobody sees while others go on: reset the session before the next prompts of a batch. Raises EngineError before the first
    token when that many do not fit.
    """
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens {max_new_tokens} is not a whole number from 1")
    session.check_prompts(prompts)
    longest = max(int(held) + len(prompt) for held, prompt in zip(session.lengths, prompts, strict=True))
    if (need := longest + max_new_tokens - 1) > session.capacity:
        raise EngineError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need {need} cache rows, the capacity is "
            f"{session.capacity}; raise --capacity or lower --max-new-tokens"
        )
    return _generate(session, prompts, max_new_tokens, sampler, np.array(sorted(stop_ids), np.int64))


def _generate(
    session: Session, prompts: list[np.ndarray], count: int, sampler: Sampler, stops: np.ndarray
) -> Iterator[np.ndarray]:
    streams = sampler.streams(session.batch)
    ended = np.zeros(session.batch, bool)
    logits = session.prefill(prompts)
    for left in range(count - 1, -1, -1):
        tokens = sampler.pick(logits, streams)
        yield np.where(ended, ENDED, tokens)
        ended |= np.isin(tokens, stops)
        if ended.all() or not left:
            return
        logits = session.decode(tokens)  # sequences that have ended go on unseen: a batch is in step


def check_logits(logits: np.ndarray) -> None:
    """Refuse logits [.., V] in which a token's score is NaN, or whose best is infinite."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise EngineError("the model's logits are not finite numbers: its weights hold NaN or infinity, or overflow its dtype")
