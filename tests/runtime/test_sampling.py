"""The C++ sampler against the Python one: the same tokens can be drawn, with the same probabilities, by a stream of its own."""

from __future__ import annotations

from typing import Any

import hf
import numpy as np
import pytest
from capi import ARGUMENT, CAPACITY, Api, CppSession, RuntimeFailure
from scipy import stats

from exporter.checkpoint import open_checkpoint
from exporter.export import ExportOptions, export
from exporter.generate import Sampler

WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 7},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 1e-9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
]


def some_logits(batch: int = 1, size: int = 50) -> np.ndarray:
    logits = np.random.default_rng(4).normal(0, 2, (batch, size)).astype(np.float32)
    logits[:, 11] = logits[:, 12] = logits[:, 3]  # equals
    return logits


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_distribution_is_pythons(way: dict[str, Any], api: Api) -> None:
    logits = some_logits()
    scores = Sampler(**way).warp(logits[0])
    expected = np.exp(scores - scores.max())
    expected /= expected.sum()
    drawn = np.bincount(api.pick(logits, 20_000, seed=9, **way)[:, 0], minlength=len(expected))
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
    likely = expected * drawn.sum() >= 5
    rest = drawn.sum() * expected[~likely].sum()
    observed, wanted = [*drawn[likely], drawn[~likely].sum()], [*expected[likely] * drawn.sum(), rest]
    if not rest:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) == 1 or stats.chisquare(observed, wanted).pvalue > 1e-3


def test_a_top_p_of_0_drops_nothing_as_1_does(api: Api) -> None:
    """A struct of zeros but for the temperature; a C++ program says the same."""
    all_of_them, zero = (api.pick(some_logits(), 500, temperature=3.0, seed=2, top_p=top_p) for top_p in (1.0, 0.0))
    assert (zero == all_of_them).all()
    assert len(np.unique(zero)) > 30


def test_seeds_and_sequences(api: Api) -> None:
    logits = np.repeat(some_logits(), 3, axis=0)
    drawn = api.pick(logits, 40, temperature=1.0, seed=1)
    assert (drawn == api.pick(logits, 40, temperature=1.0, seed=1)).all()
    assert (drawn[:, :1] == api.pick(logits[:1], 40, temperature=1.0, seed=1)).all()
    assert (drawn[:, 0] != drawn[:, 1]).any()
    assert (drawn != api.pick(logits, 40, temperature=1.0, seed=2**32 + 1)).any()


def test_greedy_takes_the_first_of_equals(api: Api) -> None:
    logits = np.array([[0, 5, 5, 1], [9, 2, 9, 9]], np.float32)
    assert api.pick(logits).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.500000 is not a number from 0"),
        ({"temperature": float("nan")}, "temperature nan is not a number"),
        ({"temperature": 1.0, "top_k": -1}, "top-k -1 is not a whole number from 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top-p 1.500000 is outside \[0, 1\]"),
    ],
)
def test_refusals(way: dict[str, Any], message: str, api: Api) -> None:
    with pytest.raises(RuntimeFailure, match=message) as caught:
        api.pick(some_logits(), **way)
    assert caught.value.status == ARGUMENT


def test_logits_that_are_no_numbers(api: Api) -> None:
    for broken in (np.nan, np.inf):
        logits = some_logits()
        logits[0, 5] = broken
        with pytest.raises(RuntimeFailure, match="the logits are not finite numbers"):
            api.pick(logits, temperature=1.0)


def test_masked_tokens_are_never_drawn(api: Api) -> None:
    """−inf, as constrained decoding has it; with nothing left to draw from it is an error."""
    logits = np.full((1, 30), -np.inf, np.float32)
    logits[:, [3, 7, 20]] = [1, 2, 1.5]
    assert api.pick(logits).tolist() == [[7]]
    ways: list[dict[str, Any]] = [{}, {"top_k": 2}, {"top_k": 9}, {"top_p": 0.99}, {"top_k": 9, "top_p": 0.5}]
    for way in ways:
        drawn = set(api.pick(logits, 200, temperature=1.0, **way).ravel())
        assert drawn <= {3, 7, 20}
        assert len(drawn) > 1 or way.get("top_p") == 0.5
    with pytest.raises(RuntimeFailure, match="the logits are not finite numbers"):
        api.pick(np.full((1, 30), -np.inf, np.float32))


@pytest.fixture(scope="module")
def session(api: Api, tmp_path_factory: pytest.TempPathFactory) -> CppSession:
    folder = tmp_path_factory.mktemp("generation")
    bundle = export(open_checkpoint(hf.save("llama", folder)), folder / "bundle", ExportOptions())
    return api.open(bundle.path).session(batch=2, capacity=40)


def test_generation_ends_where_it_should(session: CppSession) -> None:
    prompts = [np.array([3, 4, 5]), np.array([60])]
    session.reset()
    tokens = session.generate(prompts, 20)
    assert len(tokens) == 20
    assert session.lengths.tolist() == [22, 20]  # the last token is not fed
    stop = tokens[4][0]
    first = [row[0] for row in tokens].index(stop)
    session.reset()
    stopped = session.generate(prompts, 20, stop_ids=[stop])
    assert [row[0] for row in stopped[: first + 1]] == [row[0] for row in tokens[: first + 1]]
    assert all(row[0] == -1 for row in stopped[first + 1 :])
    session.reset()
    assert session.generate(prompts, 20, until=lambda row: row == tokens[2]) == tokens[:3]
    session.reset()
    words = r"^prompts\[0\] of 3 tokens and 39 new need 41 cache rows, the capacity is 40$"
    with pytest.raises(RuntimeFailure, match=words) as caught:
        session.generate(prompts, 39)
    assert caught.value.status == CAPACITY
    assert session.lengths.tolist() == [0, 0]
    session.generate(prompts, 30)
    words = (
        r"^prompts\[0\] of 3 tokens, after 32 in the cache, and 9223372036854775807 new need 9223372036854775841 cache rows, "
    )
    with pytest.raises(RuntimeFailure, match=words):
        session.generate(prompts, 2**63 - 1)
