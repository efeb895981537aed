"""A sequence that has ended while others of its batch go on: what it holds and its next turn are those of a batch of its own.

On every pattern and cache form, on ONNX Runtime's CPU and over the fakes of CUDA and TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_engines
import numpy as np
import pytest
import tiny
from capi import ARGUMENT, Api, CppSession, RuntimeFailure
from test_session import ALL, whole

from exporter.models.decoder import Decoder

ENDED = -1
STOPS = (37, 12, 48)  # the first turn's texts come to these after different times


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny.decoder()


def some_prompts(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, tiny.CONFIG.vocab_size, length) for length in (9, 30, 4)]


def columns(found: list[list[int]]) -> list[list[int]]:
    """Each sequence's tokens until its end, after which there is nothing but ENDED."""
    texts = [[row[b] for row in found] for b in range(len(found[0]))]
    ends = [text.index(ENDED) if ENDED in text else len(text) for text in texts]
    assert all(token == ENDED for text, end in zip(texts, ends, strict=True) for token in text[end:])
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


def take_turns(open_one: Callable[[int], CppSession]) -> None:
    """Three turns of three sequences, each of which ends at another time, against three sessions of one sequence."""
    together, alone = open_one(3), [open_one(1) for _ in range(3)]
    for turn in (1, 2, 3):
        prompts = some_prompts(turn)
        found = columns(together.generate(prompts, 24, STOPS))
        assert found == [columns(s.generate([p], 24, STOPS))[0] for s, p in zip(alone, prompts, strict=True)]
        assert together.lengths.tolist() == [session.lengths[0] for session in alone]
        assert turn > 1 or len({len(text) for text in found}) == 3
    prompts = some_prompts(5)
    expected = np.concatenate([session.prefill([prompt]) for session, prompt in zip(alone, prompts, strict=True)])
    np.testing.assert_allclose(together.prefill(prompts), expected, rtol=0, atol=2e-4)
    for session in (together, *alone):
        session.close()


@pytest.mark.parametrize("form", ALL, ids="-".join)
def test_turns(form: tuple[str, str], model: Decoder, api: Api, tmp_path: Path) -> None:
    opened = api.open(whole(tiny.bundle(tmp_path, model, *form)))  # type: ignore[arg-type]
    take_turns(lambda batch: opened.session(batch=batch, capacity=200, chunk=16))


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_turns_on_a_fake_gpu(pattern: str, backend: str, model: Decoder, fake: Api, tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path, model, pattern)
    whole(bundle)
    for batch in (1, 3):
        fake_engines.add(bundle, bundle.variants[0], backend, batch=batch, capacity=200, prefill=16)
    opened = fake.open(bundle.path, backend=backend)
    take_turns(lambda batch: opened.session(batch=batch, capacity=200))


@pytest.mark.parametrize("form", ALL, ids="-".join)
def test_a_loop_of_ones_own(form: tuple[str, str], model: Decoder, api: Api, tmp_path: Path) -> None:
    """decode with ENDED in any places, against the torch model."""
    session = api.open(whole(tiny.bundle(tmp_path, model, *form))).session(batch=3, capacity=120, chunk=16)  # type: ignore[arg-type]
    rows = some_prompts(7)
    session.prefill(rows)
    random = np.random.default_rng(3)
    for _ in range(40):
        goes = random.random(3) < 0.5
        if not goes.any():
            continue
        tokens = np.where(goes, random.integers(0, tiny.CONFIG.vocab_size, 3), ENDED)
        rows = [np.append(row, token) if token >= 0 else row for row, token in zip(rows, tokens, strict=True)]
        logits = session.decode(tokens)
        assert session.lengths.tolist() == [len(row) for row in rows]
        for b in np.flatnonzero(goes):
            np.testing.assert_allclose(logits[b], tiny.full_logits(model, rows[b])[-1], rtol=0, atol=2e-4)
    with pytest.raises(RuntimeFailure, match=r"^decode was given no token: all sequences have ended$") as caught:
        session.decode(np.full(3, ENDED))
    assert caught.value.status == ARGUMENT
    with pytest.raises(RuntimeFailure, match=r"^token id -2, tokens\[2\], is outside the vocabulary of 61$"):
        session.decode(np.array([1, ENDED, -2]))
    assert session.lengths.tolist() == [len(row) for row in rows]
    session.close()
