"""ModelConfig: what it accepts, what it refuses and in which words, and its JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.config import ModelConfig, RopeConfig, check_groups, group_counts, two_thirds
from exporter.decode import decode, parse
from exporter.errors import UserError

CONFIG = ModelConfig(67, 48, 2, 6, (2, 3), 16, 40, 128, bos_token_id=1, eos_token_ids=(2, 5), rope=RopeConfig(theta=500.0))
YARN = {"kind": "yarn", "factor": 4.0, "original_max_positions": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "config vocab_size 0 is not a whole number from 1 to 2147483647"),
        ({"num_layers": True}, "config num_layers True is not a whole number from 1 to 2147483647"),
        ({"head_dim": 16.0}, "config head_dim 16.0 is not a whole number from 1 to 2147483647"),
        ({"num_heads": 2**31}, "config num_heads 2147483648 is not a whole number from 1 to 2147483647"),
        ({"num_layers": 3}, "config kv_heads names 2 layers, the model has 3"),
        ({"kv_heads": (2, 4)}, "layer 1: 4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"),
        ({"kv_heads": (2, 0)}, "layer 1: 0 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"),
        ({"ffn": "mish"}, "ffn 'mish' is not one of relu, gelu, swish, glu, bilinear, reglu, geglu, swiglu"),
        ({"norm": "batch"}, "norm 'batch' is not one of rms, layer"),
        ({"head_dim": 15}, "rope rotates 15 of 15 channels; RoPE needs an even number"),
        ({"rope": RopeConfig(fraction=0.05)}, "rope rotates 0 of 16 channels; RoPE needs an even number"),
        ({"norm_eps": math.nan}, "config norm_eps nan is not a finite number ≥ 0"),
        ({"norm_eps": -1e-6}, "config norm_eps -1e-06 is not a finite number ≥ 0"),
        ({"embed_scale": math.inf}, "config embed_scale inf is not a finite number above 0"),
        ({"eos_token_ids": (2, -1)}, "config has the token id -1; ids are whole numbers from 0"),
        ({"bos_token_id": -7}, "config has the token id -7; ids are whole numbers from 0"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, **changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dynamic"}, "rope kind 'dynamic' is not one of none, default, linear, llama3, yarn"),
        ({"fraction": 0.0}, "rope fraction 0.0 is outside (0, 1]"),
        ({"fraction": 1.5}, "rope fraction 1.5 is outside (0, 1]"),
        ({"theta": 0.0}, "rope theta 0.0 is not positive"),
        ({"theta": math.nan}, "rope theta nan is not positive"),
        ({"kind": "linear", "factor": 0.0}, "rope factor 0.0 is not positive"),
        ({"kind": "llama3"}, "rope kind llama3 needs original_max_positions, the context the model was first trained on"),
        (
            {"kind": "llama3", "original_max_positions": 8, "low_freq_factor": 4.0},
            "rope high_freq_factor 4.0 is not above low_freq_factor 4.0",
        ),
        (
            {**YARN, "theta": 1.0},
            "rope kind yarn needs theta above 1 and betas above 0, has theta 1.0, beta_fast 32.0, beta_slow 1.0",
        ),
        (
            {**YARN, "beta_slow": 0.0},
            "rope kind yarn needs theta above 1 and betas above 0, has theta 10000.0, beta_fast 32.0, beta_slow 0.0",
        ),
    ],
)
def test_refused_rope(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RopeConfig(**values)
    assert str(error.value) == message


def test_json_round_trip() -> None:
    for config in (CONFIG, dataclasses.replace(CONFIG, rope=RopeConfig(**YARN, attention_factor=1.5))):
        text = json.dumps(config.to_json())
        assert ModelConfig.from_json(json.loads(text)) == config
        assert ModelConfig.from_json(parse(text)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "config.colour is an unknown key"),
        ({"vocab_size": "67"}, "config.vocab_size is '67': input should be a valid integer"),
        ({"vocab_size": None}, "config.vocab_size is None: input should be a valid integer"),
        ({"tied": 1}, "config.tied is 1: input should be a valid boolean"),
        ({"kv_heads": 2}, "config.kv_heads is 2: input should be a valid array"),
        ({"kv_heads": [2, "3"]}, "config.kv_heads[1] is '3': input should be a valid integer"),
        ({"rope": []}, "config.rope is []: input should be an object"),
        ({"rope": {"theta": "x"}}, "config.rope.theta is 'x': input should be a valid number"),
        ({"bos_token_id": 1.5}, "config.bos_token_id is 1.5: input should be a valid integer"),
        ({"kv_heads": [2, 4]}, "layer 1: 4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"),
    ],
)
def test_damaged_json(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig.from_json({**CONFIG.to_json(), **changes})
    assert str(error.value) == message


def test_missing_keys_are_named() -> None:
    data = CONFIG.to_json()
    del data["hidden_size"], data["kv_heads"]
    with pytest.raises(UserError, match=r"^config lacks hidden_size, kv_heads$"):
        ModelConfig.from_json(data)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "theta", "x"]), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*CONFIG.to_json(), "x"]), ANYTHING, max_size=3))
def test_any_json_is_a_config_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_json({**CONFIG.to_json(), **changes})
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017  it need not be refused
    else:
        assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1e999}', "1e999 is too large"),
        (str(2**63), f"{2**63} is too large"),
        (f"-{'9' * 5000}", f"-{'9' * 39} is too large"),
        ("[" * 100_000, "it is nested too deeply"),
        (r'"\ud800"', "surrogates not allowed"),
    ],
)
def test_text_that_is_not_plain_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_decode_does_not_mix_numbers_up() -> None:
    assert decode(float, 3, "x") == 3.0
    assert parse(str(1 - 2**63)) == 1 - 2**63
    for kind, value in ((int, 3.0), (int, True), (float, True), (float, "3"), (str, 3), (bool, 0)):
        with pytest.raises(UserError, match=r"^x is "):
            decode(kind, value, "x")


def test_the_place_of_an_error_is_that_of_the_data() -> None:
    """Neither a union's member nor a line break of a key gets into the line."""
    for value in ("3", [1, "3"], None):
        with pytest.raises(UserError) as error:
            decode(dict[str, int | tuple[int, ...]], {"a\nb": value}, "x")
        assert str(error.value) == f"x.a b is {value!r}: input should be a valid integer"


def test_kv_bytes_of_a_token() -> None:
    """2 + 3 KV heads of K and V with 16 channels each."""
    assert CONFIG.kv_bytes_per_token("fp32") == 5 * 2 * 16 * 4
    assert CONFIG.kv_bytes_per_token("fp16") == CONFIG.kv_bytes_per_token("bf16") == 5 * 2 * 16 * 2
    assert CONFIG.with_kv_heads(6).kv_bytes_per_token("fp32") == 12 * 2 * 16 * 4
    assert CONFIG.with_kv_heads(6).kv_heads == (6, 6)


def test_group_counts() -> None:
    assert group_counts(12) == [12, 6, 4, 3, 2, 1]
    assert group_counts(7) == [7, 1]
    assert group_counts(36) == [36, 18, 12, 9, 6, 4, 3, 2, 1]
    assert group_counts(2**31 - 1) == [2**31 - 1, 1]  # at once, also for the largest
    for count in group_counts(12):
        check_groups(12, count)
    for wrong in (0, -1, 5, 24, True, 2.0, "3"):
        with pytest.raises(UserError, match="do not divide 12 query heads; choose from 12, 6, 4, 3, 2, 1"):
            check_groups(12, wrong)


def test_two_thirds_keeps_the_parameters() -> None:
    """The paper's own numbers (arXiv 2002.05202, section 3.1): d_ff 3072 ungated, 2048 gated."""
    assert two_thirds(3072) == 2048
    assert two_thirds(4 * 4096, 256) == 11008  # Llama's
    for d_ff in (96, 1000, 4097):
        assert abs(3 * two_thirds(d_ff) - 2 * d_ff) <= 1.5
        assert two_thirds(d_ff, 64) % 64 == 0
    assert two_thirds(1, 8) == 8
    for wrong in ((0, 1), (5, 0), (-3, 1)):
        with pytest.raises(UserError, match="two_thirds needs positive numbers"):
            two_thirds(*wrong)


def test_the_config_needs_no_torch() -> None:
    code = "import exporter.config, sys; assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
