"""The tokenizer of a GGUF file, against transformers' own loader."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
from gguf_files import write
from tokenizers import Tokenizer

from exporter.checkpoint import open_checkpoint


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


def test_smollm_tokens_equal_transformers_own_gguf_loader(smollm2):
    """On text without digits, which that loader does not cut as tokenizer.ggml.pre says."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = tokenizer_of(smollm2)
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
