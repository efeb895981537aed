"""Every pattern × cache form × dtype gives the torch model's logits: prefill, chunks, decode, batches of unequal lengths."""

from __future__ import annotations

import contextlib

import harness
import numpy as np
import pytest
import torch

CAPACITY = 24
LENGTHS = [9, 4, 6]
FP32 = 2e-4  # absolute, of logits of magnitude ~10: two runtimes sum in other orders
# Half precision: both round at every step, but where sums run in other orders, and in attention, which torch computes in
# float32, they round otherwise; so each is off the exact logits by an error of its own, and all are of one size: torch's, which
# is measured (root mean square over a few prompts). A single position may lose more: up to 3.5 times that (of 160 prompts).
TIMES_TORCHS_OWN_LOSS = 4
STANDARD, PATTERNS = ("repeat", "grouped", "attention"), ("repeat", "grouped", "attention", "gqa")
MATRIX = [(p, c, d) for p in PATTERNS for c in ("static", "concat") for d in ("fp32", "fp16")]
MATRIX += [(p, c, "bf16") for p in STANDARD for c in ("static", "concat")]
MATRIX += [("fused", "static", "fp32")]


def torch_logits(decoder, prompt: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(prompt)[None]
    positions = torch.arange(len(prompt))[None]
    logits, _ = decoder(ids, positions, decoder.empty_cache(1, len(prompt)))
    return logits[0].float().numpy()


def prompts(config, lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n) for n in lengths]


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def own_loss(decoder, prompts: list[np.ndarray]) -> float:
    """Root mean square of what torch's logits lose in the decoder's dtype, against float32 with the same weights."""
    exact = harness.cast(decoder, "fp32")
    return rms(np.concatenate([torch_logits(decoder, prompt) - torch_logits(exact, prompt) for prompt in prompts]))


def close(actual, expected, loss: float) -> None:
    """`loss` is 0 in fp32."""
    if loss == 0:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=FP32)
    else:
        assert rms(actual - expected) <= TIMES_TORCHS_OWN_LOSS * loss
        assert loss < 0.05 * rms(expected)  # a model that half precision ruins would let everything pass


def in_chunks(sess, config, prompt: np.ndarray, chunks: tuple[int, ...], cache: str, dtype: str = "fp32"):
    """Of each chunk of `prompt`, one after another on top of the cache: its rows, its logits, and the caches after it."""
    past, done = harness.empty(config, 1, CAPACITY if cache == "static" else 0, dtype), 0
    for chunk in chunks:
        rows = slice(done, done + chunk)
        mask = np.ones((1, rows.stop), np.int64) if cache == "concat" else None
        logits, past = harness.run(sess, config, prompt[None, rows], np.arange(len(prompt))[None, rows], past, mask)
        yield rows, logits[0], past
        done = rows.stop
    assert done == len(prompt)


@pytest.mark.parametrize(("pattern", "cache", "dtype"), MATRIX)
@pytest.mark.parametrize("kv_heads", [(2, 2), (8, 1)])
def test_prefill_chunk_decode(pattern, cache, dtype, kv_heads):
    config = harness.tiny_config(kv_heads)
    decoder = harness.random_decoder(config, dtype)
    sess = harness.session(decoder, pattern, cache, dtype)
    (prompt,) = prompts(config, [12])
    expected, loss = torch_logits(decoder, prompt), own_loss(decoder, [prompt])
    assert (loss == 0) == (dtype == "fp32")
    assert np.abs(expected).max() > 3  # logits large enough for a wrong rotation to show
    for rows, logits, _ in in_chunks(sess, config, prompt, (5, 4, 1, 1, 1), cache, dtype):  # prefill, chunked prefill, decode
        close(logits, expected[rows], loss)


@pytest.mark.parametrize("value_dim", [8, 24])
@pytest.mark.parametrize(("pattern", "cache"), [(p, c) for p, c, dtype in MATRIX if dtype == "fp32"])
def test_gated_values_of_another_size(pattern, cache, value_dim):
    """GLU attention, whose V is smaller (or larger) than K: 16 channels."""
    config = harness.tiny_config((8, 1), glu_value_dim=value_dim)
    decoder = harness.random_decoder(config)
    sess = harness.session(decoder, pattern, cache)
    (prompt,) = prompts(config, [9])
    expected = torch_logits(decoder, prompt)
    for rows, logits, caches in in_chunks(sess, config, prompt, (6, 2, 1), cache):
        close(logits, expected[rows], 0)
        assert {array.shape[3] for array in caches[1::2]} == {value_dim}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_tolerances_notice_a_token_one_position_off(dtype):
    config = harness.tiny_config()
    decoder = harness.random_decoder(config, dtype)
    sess = harness.session(decoder, "grouped", "concat", dtype)
    (prompt,) = prompts(config, [12])
    expected, loss = torch_logits(decoder, prompt), own_loss(decoder, [prompt])
    past = harness.empty(config, 1, 0, dtype)
    first, past = harness.run(sess, config, prompt[None, :11], np.arange(11)[None], past, np.ones((1, 11), np.int64))
    close(first[0], expected[:11], loss)
    for position, right in ((11, True), (12, False)):
        last, _ = harness.run(sess, config, prompt[None, 11:], np.array([[position]]), past, np.ones((1, 12), np.int64))
        with contextlib.nullcontext() if right else pytest.raises(AssertionError):
            close(last[0], expected[11:], loss)


@pytest.mark.parametrize(("pattern", "cache", "dtype"), MATRIX)
def test_batch_of_unequal_lengths(pattern, cache, dtype):
    config = harness.tiny_config()
    decoder = harness.random_decoder(config, dtype)
    sess = harness.session(decoder, pattern, cache, dtype)
    whole = prompts(config, [n + 3 for n in LENGTHS])
    expected, loss = [torch_logits(decoder, prompt) for prompt in whole], own_loss(decoder, whole)
    longest = max(LENGTHS)
    ids = np.zeros((3, longest), np.int64)
    if cache == "static":  # padded on the right; rows past a sequence's end are overwritten before they are seen
        for row, n in enumerate(LENGTHS):
            ids[row, :n] = whole[row][:n]
        positions = np.broadcast_to(np.arange(longest), (3, longest)).copy()
        logits, past = harness.run(sess, config, ids, positions, harness.empty(config, 3, CAPACITY, dtype))
        for row, n in enumerate(LENGTHS):
            close(logits[row, :n], expected[row][:n], loss)
        mask = None
    else:  # padded on the left, as transformers does
        mask = np.zeros((3, longest), np.int64)
        for row, n in enumerate(LENGTHS):
            ids[row, longest - n :], mask[row, longest - n :] = whole[row][:n], 1
        positions = np.clip(mask.cumsum(1) - 1, 0, None)
        logits, past = harness.run(sess, config, ids, positions, harness.empty(config, 3, 0, dtype), mask)
        for row, n in enumerate(LENGTHS):
            close(logits[row, longest - n :], expected[row][:n], loss)
    # One decode step, then a chunk of two, every row at its own position. GroupQueryAttention takes no batch of chunks.
    for step, width in ((0, 1), (1, 1 if pattern == "gqa" else 2)):
        ids = np.stack([whole[row][n + step : n + step + width] for row, n in enumerate(LENGTHS)])
        positions = np.array(LENGTHS)[:, None] + np.arange(step, step + width)
        if mask is not None:
            mask = np.concatenate([mask, np.ones((3, width), np.int64)], axis=1)
        logits, past = harness.run(sess, config, ids, positions, past, mask)
        for row, n in enumerate(LENGTHS):
            close(logits[row], expected[row][n + step : n + step + width], loss)


@pytest.mark.parametrize("pattern", [*PATTERNS, "fused"])
def test_last_logits_are_the_last_of_all(pattern):
    config = harness.tiny_config(tied=False)
    decoder = harness.random_decoder(config)
    (prompt,) = prompts(config, [7])
    last = harness.session(decoder, pattern, "static", logits="last")
    logits, _ = harness.run(last, config, prompt[None], np.arange(7)[None], harness.empty(config, 1, CAPACITY))
    assert logits.shape == (1, 1, config.vocab_size)
    close(logits[0, 0], torch_logits(decoder, prompt)[-1], 0)
