"""The binding names, dtypes, shapes and aliases, written out by hand."""

from __future__ import annotations

import json

import pytest

from exporter import contract
from exporter.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(67, 48, 2, 6, (2, 3), 16, 40, 128, rope=RopeConfig())


def rows(bindings):
    return [(b.name, b.dtype, b.shape, b.role, b.layer, b.alias) for b in bindings]


def test_static() -> None:
    assert rows(contract.inputs(CONFIG, "static", "fp16")) == [
        ("input_ids", "int64", ("batch", "sequence"), "tokens", None, None),
        ("position_ids", "int64", ("batch", "sequence"), "positions", None, None),
        ("past_key_values.0.key", "fp16", ("batch", 2, "capacity", 16), "cache", 0, None),
        ("past_key_values.0.value", "fp16", ("batch", 2, "capacity", 16), "cache", 0, None),
        ("past_key_values.1.key", "fp16", ("batch", 3, "capacity", 16), "cache", 1, None),
        ("past_key_values.1.value", "fp16", ("batch", 3, "capacity", 16), "cache", 1, None),
    ]
    assert rows(contract.outputs(CONFIG, "static", "fp16")) == [
        ("logits", "fp16", ("batch", 1, 67), "logits", None, None),
        ("present.0.key", "fp16", ("batch", 2, "capacity", 16), "cache", 0, "past_key_values.0.key"),
        ("present.0.value", "fp16", ("batch", 2, "capacity", 16), "cache", 0, "past_key_values.0.value"),
        ("present.1.key", "fp16", ("batch", 3, "capacity", 16), "cache", 1, "past_key_values.1.key"),
        ("present.1.value", "fp16", ("batch", 3, "capacity", 16), "cache", 1, "past_key_values.1.value"),
    ]


def test_concat() -> None:
    assert rows(contract.inputs(CONFIG, "concat", "fp32"))[:4] == [
        ("input_ids", "int64", ("batch", "sequence"), "tokens", None, None),
        ("attention_mask", "int64", ("batch", "total"), "mask", None, None),
        ("position_ids", "int64", ("batch", "sequence"), "positions", None, None),
        ("past_key_values.0.key", "fp32", ("batch", 2, "past", 16), "cache", 0, None),
    ]
    outputs = rows(contract.outputs(CONFIG, "concat", "fp32", "all"))
    assert outputs[0] == ("logits", "fp32", ("batch", "sequence", 67), "logits", None, None)
    assert outputs[4] == ("present.1.value", "fp32", ("batch", 3, "total", 16), "cache", 1, None)
    assert len(outputs) == 5


@pytest.mark.parametrize("cache", ["static", "concat"])
def test_past_and_present_are_pairs_and_only_static_ones_share_memory(cache) -> None:
    inputs = {binding.name: binding for binding in contract.inputs(CONFIG, cache, "fp32")}
    for layer in range(2):
        for past, present in zip(contract.past_names(layer), contract.present_names(layer), strict=True):
            output = next(b for b in contract.outputs(CONFIG, cache, "fp32") if b.name == present)
            assert output.alias == (past if cache == "static" else None)
            assert (output.dtype, output.shape[:2], output.shape[3]) == (
                inputs[past].dtype,
                inputs[past].shape[:2],
                inputs[past].shape[3],
            )


def test_json_leaves_out_what_is_not_there() -> None:
    first, *_, last = (binding.to_json() for binding in contract.outputs(CONFIG, "static", "fp32"))
    assert json.loads(json.dumps(first)) == {"name": "logits", "dtype": "fp32", "shape": ["batch", 1, 67], "role": "logits"}
    assert last["layer"] == 1
    assert last["alias"] == "past_key_values.1.value"
