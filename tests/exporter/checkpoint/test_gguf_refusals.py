"""GGUF files that are refused in one line, and fuzzed ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import FLOATS, LLAMA_KEYS, TOKENS, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.checkpoint import check_finite, expected_shapes, open_checkpoint
from exporter.checkpoint.gguf_config import HARMLESS
from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.gguf_llama import gguf_name
from exporter.checkpoint.hf_config import parse_config
from exporter.config import ModelConfig
from exporter.errors import CheckpointError

REFUSED = [
    ({"architecture": "qwen2"}, "general.architecture 'qwen2' is not one of llama"),
    ({"expert_count": 8}, "llama.expert_count 8 is not supported"),
    ({"logit_scale": 0.5}, "llama.logit_scale 0.5 is not supported"),
    ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn' is not one of none, linear"),
    ({"rope__dimension_count": 8}, "RoPE on 8 of 16 channels is not part of llama"),
    ({"attention__value_length": 8}, "heads of K and V differ in size (16 and 8)"),
    ({"rope__scaling__attn_factor": 2.0}, "llama.rope.scaling.attn_factor 2.0 is not supported"),
    ({"attention__head_count_kv": [2]}, "llama.attention.head_count_kv has 1 numbers for 2 layers"),
    ({"attention__head_count_kv": [2, 1]}, "llama.attention.head_count_kv [2, 1] is not one whole number ≥ 1"),
    ({"attention__head_count_kv": 3}, "layer 0: 3 KV heads do not divide 4 query heads; choose from 4, 2, 1"),
    ({"block_count": "2"}, "llama.block_count '2' is not one whole number ≥ 1"),
    ({"drop": ("context_length",)}, "llama.context_length None is not one whole number ≥ 1"),
    ({"vocab_size": 9}, f"vocab_size is 9, token_embd.weight has {len(TOKENS)} rows"),
    ({"rope__freq_base": 0}, "llama.rope.freq_base 0 is not a float"),
    (
        {"drop": ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"), "feed_forward_length": 100},
        "tensors do not fit its config: 2 missing (blk.1.ffn_up.weight, output_norm.weight); 5 of the wrong shape ("
        "blk.0.ffn_gate.weight is [96, 64], its config says [100, 64], "
        "blk.0.ffn_up.weight is [96, 64], its config says [100, 64], "
        "blk.0.ffn_down.weight is [64, 96], its config says [64, 100], "
        "blk.1.ffn_gate.weight is [96, 64], its config says [100, 64], "
        "blk.1.ffn_down.weight is [64, 96], its config says [64, 100])",
    ),
    ({"tokenizer__tokens": [*TOKENS[:-1], "a"]}, "its tokenizer is damaged: 1 tokens stand twice"),
    ({"tokenizer__merges": ["a"]}, "its tokenizer is damaged: merge 'a' is not two tokens"),
    ({"tokenizer__types": [1]}, f"its tokenizer is damaged: 1 token types for {len(TOKENS)} tokens"),
    ({"tokenizer__merges": ["q z"]}, "its tokenizer is damaged: Error while initializing BPE: Token `qz` out of vocabulary"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_by_name(changes, text, tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(write(path, **changes))
    assert str(error.value) == f"{path}: {text}"


def test_a_vector_of_quantised_numbers(tmp_path, monkeypatch):
    path = write(tmp_path / "tiny.gguf")
    file = read_gguf(path)
    name = "blk.0.attn_norm.weight"
    file.tensors[name] = replace(file.tensors[name], kind=Kind.Q8_0)
    monkeypatch.setattr("exporter.checkpoint.gguf_llama.read_gguf", lambda _: file)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert str(error.value) == f"{path}: tensor '{name}' is Q8_0, in which only matrices come"


def test_a_factor_without_a_type_is_linear(tmp_path):
    """As llama.cpp reads it."""
    config = open_checkpoint(write(tmp_path / "tiny.gguf", rope__scaling__factor=4.0)).config
    assert (config.rope.kind, config.rope.factor) == ("linear", 4.0)


def test_a_kind_that_cannot_be_dequantised(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    name = gguf_name("model.layers.1.mlp.up_proj.weight").encode()
    place = data.index(name) + len(name) + 4 + 16  # the type follows the number of dimensions and two dimensions
    path.write_bytes(data[:place] + int(Kind.I32).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert str(error.value) == f"{path}: tensor 'blk.1.ffn_up.weight' is I32, which cannot be dequantised here"


BROKEN = [
    (b"", "4 bytes are needed where 0 are left"),
    (b"GGML", "it does not start with GGUF"),
    (b"GGUF\3\0\0\0" + b"\xff" * 16, "8 bytes are needed where 0 are left"),
    (b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\xff" * 8, f"a string of {2**64 - 1} bytes"),
    (
        b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\1" + b"\0" * 7 + b"a\x09\0\0\0\x04\0\0\0" + b"\xff" * 8,
        f"an array of {2**64 - 1} items",
    ),
    (
        b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\1" + b"\0" * 7 + b"a\x09\0\0\0\x08\0\0\0" + b"\0\0\1" + b"\0" * 5,
        "an array of 65536 strings with 0 bytes left",
    ),
]


def refused(data: bytes, folder: Path) -> str:
    """What a file a.gguf of these bytes is refused with, without the folder's name."""
    path = folder / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(("data", "why"), BROKEN, ids=lambda value: str(value)[:40])
def test_broken_files(data, why, tmp_path):
    assert refused(data, tmp_path) == f"a.gguf is not a whole GGUF file: {why}; download it again"


@pytest.mark.parametrize(("data", "version"), [(b"GGUF\1\0\0\0", 1), (b"GGUF\0\0\0\3", 50331648)])
def test_a_version_that_is_not_read(data, version, tmp_path):
    assert refused(data, tmp_path) == f"a.gguf: GGUF version {version} is not one of 2, 3 in little-endian order"


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_damaged_files_are_refused_or_read_to_the_end(flips, cut, tmp_path):
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write(whole, kind=Kind.Q8_0)
    data = bytearray(whole.read_bytes())
    entries = read_gguf(whole).tensors.values()
    header, end = min(entry.offset for entry in entries), max(entry.offset + entry.nbytes for entry in entries)
    for where, change in flips:
        data[int(where * (header - 1))] ^= change
    path = tmp_path / "tiny.gguf"
    path.write_bytes(data if cut is None else data[: int(cut * (end - 1))])
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.weights.values():
            check_finite(tensor)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  it need not be refused
    else:
        assert cut is None


NUMBERS = st.integers(0, 300) | st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]) | st.floats(width=32)
VALUES = NUMBERS | st.text(max_size=4) | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3)
METADATA = st.dictionaries(
    st.sampled_from([*LLAMA_KEYS, *FLOATS, *HARMLESS, "attention.key_length", "rope.scaling.type", "rope.scaling.factor"]),
    VALUES,
    max_size=3,
)
TOKENIZER = st.fixed_dictionaries(
    {},
    optional={
        "tokenizer.pre": st.text(max_size=4) | st.sampled_from(["gpt-2", "llama-bpe"]),
        "tokenizer.tokens": st.lists(st.text(max_size=3), min_size=1, max_size=5),
        "tokenizer.types": st.lists(st.integers(-1, 7), min_size=1, max_size=len(TOKENS)),
        "tokenizer.merges": st.lists(st.text("the ", max_size=4), min_size=1, max_size=3),
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(metadata=METADATA, tokenizer=TOKENIZER)
def test_any_metadata_is_read_or_refused_in_one_line(metadata, tokenizer, tmp_path):
    try:
        checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", **metadata, **tokenizer))
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  it need not be refused
    else:
        assert {name: tensor.shape for name, tensor in checkpoint.weights.items()} == expected_shapes(checkpoint.config)
        assert ModelConfig.from_json(checkpoint.config.to_json()) == checkpoint.config
        assert parse_config(checkpoint.hf_config) == checkpoint.config
