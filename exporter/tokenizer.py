"""Text to tokens and back, from the tokenizer files that Hugging Face writes beside a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import UserError

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json with the chat template and the special tokens of its tokenizer_config.json."""

    name: str
    core: Any  # tokenizers.Tokenizer
    settings: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """From a bundle's or a checkpoint's folder. Raises UserError."""
        folder = Path(folder)
        try:
            files = {
                name: (folder / name).read_bytes() for name in (TOKENIZER, SETTINGS, TEMPLATE) if (folder / name).is_file()
            }
        except OSError as error:
            raise UserError(f"the tokenizer of {folder} cannot be read: {error}") from None
        return cls.from_files(files, str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str) -> Tokenizer:
        """From the files' bytes by file name (a checkpoint's `side_files`). Raises UserError."""
        import tokenizers

        if TOKENIZER not in files:
            raise UserError(f"{name} has no {TOKENIZER}; give a model that carries its tokenizer")
        try:
            core = tokenizers.Tokenizer.from_str(files[TOKENIZER].decode("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{name}: {TOKENIZER} cannot be read: {' '.join(str(error).split())[:200]}") from None
        core.no_padding()
        core.no_truncation()  # a prompt is refused when it is too long, never cut
        try:
            settings = json.loads(files.get(SETTINGS, b"{}"))
            if not isinstance(settings, dict):
                raise TypeError(f"it holds a {type(settings).__name__}")
            template = files[TEMPLATE].decode("utf-8") if TEMPLATE in files else _template(settings.get("chat_template"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{name}: {SETTINGS} or {TEMPLATE} is damaged: {type(error).__name__}: {error}") from None
        return cls(name, core, settings, template)

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """int64 token ids; with `special`, what the tokenizer puts around a text (BOS), as transformers does."""
        return np.array(self.core.encode(text, add_special_tokens=special).ids, np.int64)

    def decode(self, ids: np.ndarray) -> str:
        """The text without special tokens."""
        return self.core.decode([int(token) for token in ids], skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt for an assistant's answer to `messages` (role and content). Encode it with special=False.

        The template comes with the model, so it runs in jinja's sandbox, with what transformers gives it.
        """
        if self.template is None:
            raise UserError(f"{self.name} has no chat template; run it without --chat")
        import jinja2
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            special = {key: _content(value) for key, value in self.settings.items() if key.endswith("_token") and value}
            return environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **special
            )
        except Exception as error:  # the template is a program, of whoever made the model
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template of {self.name} failed: {type(error).__name__}: {reason}") from None


def check_tokenizer(files: Mapping[str, bytes], name: str) -> None:
    """Refuse a damaged tokenizer before it is copied beside a model. That there is none is for whoever needs one to say."""
    if TOKENIZER in files:
        Tokenizer.from_files(files, name)


class TextStream:
    """Tokens one by one, text as soon as it is certain: a character whose bytes have not all come is held back.

    Text is the difference of two decodings that start at the same token, since a tokenizer may write a token otherwise after
    another one (the space before a word).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []  # from the last token but one that was told
        self._told = 0  # how many of them the text so far covers

    def push(self, token: int) -> str:
        """The text that `token` makes certain, often empty."""
        self._ids.append(int(token))
        return self._advance(final=False)

    def finish(self) -> str:
        """What is still held back; incomplete bytes become U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self.tokenizer.decode(np.array(self._ids[: self._told]))
        text = self.tokenizer.decode(np.array(self._ids))
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return text[len(before) :]


def _template(value: Any) -> str | None:
    """tokenizer_config.json's chat_template: a text, or a list of named ones of which "default" is meant."""
    if isinstance(value, list):
        value = {item["name"]: item["template"] for item in value}.get("default")
    if value is not None and not isinstance(value, str):
        raise TypeError(f"chat_template is a {type(value).__name__}")
    return value


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
