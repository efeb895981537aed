"""The tokenizer against the tokenizers library and transformers, with a byte-level BPE trained here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import UserError
from exporter.tokenizer import Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
TEMPLATE = (
    "{% for message in messages %}\n  {% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "{% if loop.index > 20 %}{% break %}{% endif %}"
    "{{ bos_token }}{{ '<|im_start|>' + message['role'] }}\n{{ message['content'] | tojson }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 20, trainer)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return core


CORE = train()
FILES = {
    "tokenizer.json": CORE.to_str().encode(),
    "tokenizer_config.json": json.dumps(
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
            "eos_token": "<|im_end|>",
            "chat_template": TEMPLATE,
        }
    ).encode(),
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "ünïcode" <b>.'}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_text_and_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    ids = tokenizer.encode("the cat, größer 🙂")
    assert ids.dtype == np.int64
    assert ids[0] == 2
    assert tokenizer.decode(ids) == "the cat, größer 🙂"
    assert tokenizer.encode("the cat", special=False).tolist() == tokenizer.encode("the cat")[1:].tolist()


def test_a_truncating_tokenizer_does_not_cut_prompts() -> None:
    core = train()
    core.enable_truncation(4)
    core.enable_padding(length=64)
    tokenizer = Tokenizer.from_files({"tokenizer.json": core.to_str().encode()}, "m")
    assert len(tokenizer.encode("the cat sat on the mat and the dog")) == 10


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_of_several_tokens_is_held_until_it_is_whole() -> None:
    tokenizer = Tokenizer.from_files(FILES, "m")
    ids = tokenizer.encode("a🙂b", special=False).tolist()
    assert len(ids) == 6
    assert streamed(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]
    assert streamed(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]
    assert streamed(tokenizer, [2, *ids[:1], 1]) == ["", "a", "", ""]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, CORE.get_vocab_size() - 1), max_size=30))
def test_streamed_text_is_the_whole_text(ids: list[int]) -> None:
    tokenizer = Tokenizer.from_files(FILES, "m")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(np.array(ids))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_streamed_words_of_a_tokenizer_that_strips_the_first_space(text: str) -> None:
    core = tokenizers.Tokenizer.from_str(CORE.to_str())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer.from_files({"tokenizer.json": core.to_str().encode()}, "m")
    ids = tokenizer.encode(text).tolist()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(np.array(ids))


def test_the_chat_prompt_is_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    expected = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert Tokenizer.open(folder).chat(MESSAGES) == expected
    assert "assistant" in expected


def test_where_a_chat_template_may_stand() -> None:
    named = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    files = {"tokenizer.json": FILES["tokenizer.json"], "tokenizer_config.json": json.dumps(named).encode()}
    assert Tokenizer.from_files(files, "m").chat(MESSAGES) == "D"
    assert Tokenizer.from_files({**files, "chat_template.jinja": b"J"}, "m").chat(MESSAGES) == "J"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only user turns') }}", "chat template of m failed: TemplateError: only user turns"),
        ("{{ 1 / 0 }}", "chat template of m failed: ZeroDivisionError: division by zero"),
        ("{% if %}", "chat template of m failed: TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "chat template of m failed: SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template of m failed: SecurityError"),
    ],
)
def test_a_bad_template_is_one_line(template: str, message: str) -> None:
    files = {"tokenizer.json": FILES["tokenizer.json"], "chat_template.jinja": template.encode()}
    with pytest.raises(UserError, match=message):
        Tokenizer.from_files(files, "m").chat(MESSAGES)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json; give a model that carries its tokenizer$"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.open(tmp_path)
    with_template = {"tokenizer.json": FILES["tokenizer.json"], "chat_template.jinja": b"J"}
    with pytest.raises(
        UserError, match=r"^m: tokenizer_config.json or chat_template.jinja is damaged: TypeError: it holds a list$"
    ):
        Tokenizer.from_files({**with_template, "tokenizer_config.json": b"[]"}, "m")
    nameless = Tokenizer.from_files({**with_template, "tokenizer_config.json": b'{"bos_token": {"x": 1}}'}, "m")
    with pytest.raises(UserError, match=r"^the chat template of m failed: KeyError: 'content'$"):
        nameless.chat(MESSAGES)
    for settings_file in (b"[1]", b"{", b'{"chat_template": 3}', b'{"chat_template": [{}]}'):
        with pytest.raises(UserError, match="is damaged"):
            Tokenizer.from_files({"tokenizer.json": FILES["tokenizer.json"], "tokenizer_config.json": settings_file}, "m")
    with pytest.raises(UserError, match="m has no chat template; run it without --chat"):
        Tokenizer.from_files({"tokenizer.json": FILES["tokenizer.json"]}, "m").chat(MESSAGES)
