"""FusedAttention over caches of fp16 and int8 rows, against numpy in float64 on rows that numpy rounded."""

from __future__ import annotations

import functools

import harness
import numpy as np
import onnx_ir as ir
import pytest
from one_attention import build, feeds

from graphs.caches import CACHES, row_width
from graphs.errors import GraphError
from graphs.lower import lower
from graphs.patterns import PATTERNS

NAMES = ("past_key", "past_value")
TOLERANCE = 2e-5  # absolute, of outputs of order 1: sums of thousands of floats


def rounded(rows: np.ndarray, cache: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows as a cache holds them, and what they stand for in float64."""
    if cache == "fp16":
        return rows.astype(np.float16), rows.astype(np.float16).astype(np.float64)
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(127)
    q = np.rint(np.divide(rows, scale, where=scale > 0, out=np.zeros_like(rows)))
    stored = np.concatenate([q.astype(np.int8), scale.view(np.int8)], axis=-1)
    return stored, q.astype(np.float64) * scale


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray, scale: float) -> np.ndarray:
    """query [B,T,H,D] over keys [B,G,S,D] and values [B,G,S,Dv] → [B,T,H·Dv], in float64."""
    heads = query.shape[2] // keys.shape[1]
    scores = np.einsum("bthd,bhsd->bhts", query.astype(np.float64), keys.repeat(heads, 1)) * scale
    scores[np.broadcast_to(np.arange(keys.shape[2]) > positions[:, None, :, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output = np.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdims=True), values.repeat(heads, 1))
    return output.reshape(*output.shape[:2], -1)


@functools.cache
def session(cache: str, *sizes: int):
    return harness.ort_session(ir.to_proto(lower(build(*sizes), "fused", cache=cache)), own_operators=True, threads=2)


def stored_feeds(cache: str, sizes: tuple[int, ...], starts: list[int], T: int, S: int) -> dict[str, np.ndarray]:
    """As `feeds` has them, the caches stored; the rows from starts[b] on hold NaN, for int8 in their scales."""
    given = feeds(*sizes, starts, T, S)
    for name in NAMES:
        known = np.nan_to_num(given[name])
        stored, _ = rounded(known, cache)
        for b, start in enumerate(starts):
            stored[b, :, start:] = np.nan if cache == "fp16" else np.array([np.nan], np.float32).view(np.int8)[-1]
            if cache == "int8":
                stored[b, :, start:, -4:] = np.array([np.nan], np.float32).view(np.int8)
        given[name] = stored
    return given


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("H", "G", "D", "Dv"),
    [(6, 2, 40, 40), (4, 4, 64, 64), (16, 1, 64, 32), (9, 3, 80, 80), (8, 2, 128, 128), (4, 1, 256, 256), (6, 3, 12, 7)],
)
@pytest.mark.parametrize(("starts", "T", "S"), [([3, 0], 70, 80), ([5], 7, 12), ([9, 30, 0], 1, 64), ([2299, 40], 1, 2300)])
def test_outputs_and_rows(cache, H, G, D, Dv, starts, T, S):
    sizes = (H, G, D, Dv, 0)
    given = stored_feeds(cache, sizes, starts, T, S)
    output, *present = session(cache, *sizes).run(None, given)
    B, floats = len(starts), []
    for name, before, after, size in zip(("key", "value"), NAMES, present, (D, Dv), strict=True):
        new, as_floats = rounded(given[name].reshape(B, T, G, size).transpose(0, 2, 1, 3), cache)
        _, old = rounded(np.nan_to_num(feeds(*sizes, starts, T, S)[before]), cache)
        expected = given[before].copy()
        for b, start in enumerate(starts):
            expected[b, :, start : start + T] = new[b]
            old[b, :, start : start + T] = as_floats[b]
        np.testing.assert_array_equal(after, expected)  # to the bit: written where they belong, all else untouched
        floats.append(old)
    query = given["query"].reshape(B, T, H, D)
    wanted = attention(query, *floats, given["position_ids"], D**-0.5)
    np.testing.assert_allclose(output, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
def test_keys_are_rounded_after_they_rotate(cache):
    """One step of the row's own is what sums of floats in another order may move a value by."""
    sizes, T = (6, 2, 16, 16, 8), 5
    given = stored_feeds(cache, sizes, [3], T, 20)
    _, present, _ = session(cache, *sizes).run(None, given)
    key = given["key"].reshape(1, T, 2, 16).transpose(0, 2, 1, 3).astype(np.float64)
    cos, sin = (given[name][:, None].astype(np.float64) for name in ("cos", "sin"))
    first, second = key[..., :4], key[..., 4:8]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin, key[..., 8:]], axis=-1)
    _, wanted = rounded(rotated.astype(np.float32), cache)
    rows = present[:, :, 3 : 3 + T]
    scale = rows[..., -4:].copy().view(np.float32) if cache == "int8" else np.abs(wanted) * 2.0**-10
    found = rows[..., :16].astype(np.float64) * (scale if cache == "int8" else 1)
    assert (np.abs(found - wanted) <= scale * 1.001).all()
    assert (np.abs(found - wanted) <= 1e-6).mean() > 0.95


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("T", [1, 6])
def test_in_place_and_not(cache, T):
    sizes, S = (6, 2, 16, 8, 16), 40
    given = stored_feeds(cache, sizes, [11, 30], T, S)
    before = {name: array.copy() for name, array in given.items()}
    expected = session(cache, *sizes).run(None, given)
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])
    binding = session(cache, *sizes).io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    buffers = [np.zeros_like(expected[0]), given["past_key"], given["past_value"]]
    for value, array in zip(session(cache, *sizes).get_outputs(), buffers, strict=True):
        binding.bind_output(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    session(cache, *sizes).run_with_iobinding(binding)
    for actual, wanted in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("width", [0, 3, 4, 8, 11, 13])
def test_rows_of_another_width(width):
    """Of int8 caches for 8 channels, which have 12 bytes."""
    sizes = (4, 2, 8, 8, 0)
    model = lower(build(*sizes), "fused", cache="int8")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([None] * len(value.shape))  # so that the runtime itself lets them through
    runtime = harness.ort_session(ir.to_proto(model), own_operators=True)
    given = stored_feeds("int8", sizes, [2], 3, 8)
    runtime.run(None, given)
    for name in NAMES:
        with pytest.raises(Exception, match="FusedAttention: the shapes of its inputs contradict each other"):
            runtime.run(None, {**given, name: np.zeros((1, 2, 8, width), np.int8)})


def test_caches_of_two_types():
    model = lower(build(4, 2, 8, 8, 0), "fused", cache="int8")
    value = next(value for value in model.graph.inputs if value.name == "past_value")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", 2, "S", 8])
    with pytest.raises(Exception, match="FusedAttention"):
        harness.ort_session(ir.to_proto(model), own_operators=True)


@pytest.mark.parametrize("cache", CACHES)
def test_only_caches_change(cache):
    model = build(6, 2, 16, 12, 16)
    plain, stored = lower(model, "fused"), lower(model, "fused", cache=cache)
    kind = {"fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}[cache]
    for before, after in zip(
        (*plain.graph.inputs, *plain.graph.outputs), (*stored.graph.inputs, *stored.graph.outputs), strict=True
    ):
        assert before.name == after.name
        if after.name.startswith(("past", "present")):
            assert (after.dtype, after.shape[3]) == (kind, row_width(before.shape[3], cache))
            assert list(after.shape)[:3] == list(before.shape)[:3]
        else:
            assert (after.dtype, after.shape) == (before.dtype, before.shape)


def test_refusals():
    for pattern in set(PATTERNS) - {"fused"}:
        with pytest.raises(GraphError) as caught:
            lower(build(6, 2, 16, 16, 16), pattern, cache="int8")
        assert str(caught.value) == (
            f"pattern {pattern} keeps its cache in the dtype of the activations; one of int8 is for the pattern fused, "
            "whose operator converts as it reads"
        )
    with pytest.raises(GraphError, match="cache dtype 'int4' is not one of fp16, int8"):
        lower(build(6, 2, 16, 16, 16), "fused", cache="int4")
