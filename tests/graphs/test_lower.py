"""Every pattern × cache form × dtype gives the torch model's logits: prefill, chunks, decode, batches of unequal lengths."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

spec = importlib.util.spec_from_file_location("graphs_harness", Path(__file__).with_name("harness.py"))
harness = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = harness
spec.loader.exec_module(harness)

CAPACITY = 24
LENGTHS = [9, 4, 6]
# fp32: two runtimes sum in other orders. fp16: torch computes attention in float32, the runtime rounds each step to
# half precision (2⁻¹¹ relative), over two layers with logits of magnitude ~10.
TOLERANCE = {"fp32": 2e-4, "fp16": 0.15}
MATRIX = [(p, c, d) for p in ("repeat", "grouped", "attention", "gqa") for c in ("static", "concat") for d in ("fp32", "fp16")]


def torch_logits(decoder, prompt: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(prompt)[None]
    positions = torch.arange(len(prompt))[None]
    logits, _ = decoder(ids, positions, decoder.empty_cache(1, len(prompt)))
    return logits[0].float().numpy()


def prompts(config, lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n) for n in lengths]


def close(actual, expected, dtype):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("pattern", "cache", "dtype"), MATRIX)
@pytest.mark.parametrize("kv_heads", [(2, 2), (8, 1)])
def test_prefill_chunk_decode(pattern, cache, dtype, kv_heads):
    config = harness.tiny_config(kv_heads)
    decoder = harness.random_decoder(config, dtype)
    sess = harness.session(decoder, pattern, cache, dtype)
    (prompt,) = prompts(config, [12])
    expected = torch_logits(decoder, prompt)
    assert np.abs(expected).max() > 3  # logits large enough for a wrong rotation to show
    past = harness.empty(config, 1, CAPACITY if cache == "static" else 0, dtype)
    done = 0
    for chunk in (5, 4, 1, 1, 1):  # prefill, chunked prefill, decode
        ids = prompt[None, done : done + chunk]
        positions = np.arange(done, done + chunk)[None]
        mask = np.ones((1, done + chunk), np.int64) if cache == "concat" else None
        logits, past = harness.run(sess, config, ids, positions, past, mask)
        close(logits[0], expected[done : done + chunk], dtype)
        done += chunk


@pytest.mark.parametrize(("pattern", "cache", "dtype"), MATRIX)
def test_batch_of_unequal_lengths(pattern, cache, dtype):
    config = harness.tiny_config()
    decoder = harness.random_decoder(config, dtype)
    sess = harness.session(decoder, pattern, cache, dtype)
    whole = prompts(config, [n + 3 for n in LENGTHS])
    expected = [torch_logits(decoder, prompt) for prompt in whole]
    longest = max(LENGTHS)
    ids = np.zeros((3, longest), np.int64)
    if cache == "static":  # padded on the right; rows past a sequence's end are overwritten before they are seen
        for row, n in enumerate(LENGTHS):
            ids[row, :n] = whole[row][:n]
        positions = np.broadcast_to(np.arange(longest), (3, longest)).copy()
        logits, past = harness.run(sess, config, ids, positions, harness.empty(config, 3, CAPACITY, dtype))
        for row, n in enumerate(LENGTHS):
            close(logits[row, :n], expected[row][:n], dtype)
        mask = None
    else:  # padded on the left, as transformers does
        mask = np.zeros((3, longest), np.int64)
        for row, n in enumerate(LENGTHS):
            ids[row, longest - n :], mask[row, longest - n :] = whole[row][:n], 1
        positions = np.clip(mask.cumsum(1) - 1, 0, None)
        logits, past = harness.run(sess, config, ids, positions, harness.empty(config, 3, 0, dtype), mask)
        for row, n in enumerate(LENGTHS):
            close(logits[row, longest - n :], expected[row][:n], dtype)
    # One decode step, then a chunk of two, every row at its own position. GroupQueryAttention takes no batch of chunks.
    for step, width in ((0, 1), (1, 1 if pattern == "gqa" else 2)):
        ids = np.stack([whole[row][n + step : n + step + width] for row, n in enumerate(LENGTHS)])
        positions = np.array(LENGTHS)[:, None] + np.arange(step, step + width)
        if mask is not None:
            mask = np.concatenate([mask, np.ones((3, width), np.int64)], axis=1)
        logits, past = harness.run(sess, config, ids, positions, past, mask)
        for row, n in enumerate(LENGTHS):
            close(logits[row], expected[row][n + step : n + step + width], dtype)


@pytest.mark.parametrize("pattern", ["repeat", "grouped", "attention", "gqa"])
def test_last_logits_are_the_last_of_all(pattern):
    config = harness.tiny_config(tied=False)
    decoder = harness.random_decoder(config)
    (prompt,) = prompts(config, [7])
    last = harness.session(decoder, pattern, "static", logits="last")
    logits, _ = harness.run(last, config, prompt[None], np.arange(7)[None], harness.empty(config, 1, CAPACITY))
    assert logits.shape == (1, 1, config.vocab_size)
    close(logits[0, 0], torch_logits(decoder, prompt)[-1], "fp32")
