"""What `run` and `eval` do between a path and a session: prompts, tokenizers, and one generation with its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from exporter.bundle import Bundle, Variant, holds_bundle
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.config import ModelConfig
from exporter.engines import open_session
from exporter.engines.base import Session
from exporter.errors import EngineError, UserError
from exporter.generate import ENDED, Sampler, generate
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.tokenizer import TOKENIZER, Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, and the tokenizer, if there is one; `as_ids` are answered with ids, as they came."""

    ids: list[np.ndarray]
    tokenizer: Tokenizer | None
    as_ids: bool = False

    @classmethod
    def from_ids(cls, bundle: Bundle, variant: Variant, ids: tuple[int, ...]) -> Prompts:
        if max(ids) >= variant.config.vocab_size:
            raise EngineError(f"token id {max(ids)} is outside the vocabulary of {variant.config.vocab_size}")
        tokenizer = Tokenizer.open(bundle.path) if (bundle.path / TOKENIZER).is_file() else None
        return cls([np.array(ids, np.int64)], tokenizer, as_ids=True)

    @classmethod
    def from_texts(cls, bundle: Bundle, variant: Variant, texts: list[str], chat: bool) -> Prompts:
        if not (bundle.path / TOKENIZER).is_file():
            raise UserError(f"{bundle.path} has no {TOKENIZER}; give token ids with --tokens, or a bundle that has one")
        tokenizer = Tokenizer.open(bundle.path)
        names = [f"prompt {number}" for number in range(1, len(texts) + 1)] if len(texts) > 1 else ["the prompt"]
        bos = variant.config.bos_token_id
        way = "" if bos is None else f", or --tokens {bos} to begin with the model's first token alone"
        for name, text in zip(names, texts, strict=True):
            if not text:
                raise UserError(f"{name} is empty; give it some text{way}")
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise UserError(f"{name} is not UTF-8 text")
        if chat:
            texts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
        ids = [tokenizer.encode(text, special=not chat) for text in texts]
        for name, prompt in zip(names, ids, strict=True):
            if not len(prompt):
                raise UserError(f"{name} holds nothing the model has a token for; give it other text{way}")
        return cls(ids, tokenizer)


class Generation:
    """One batch of prompts answered. A context manager; `stream` gives the first sequence's text as it comes."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        prompts: Prompts,
        sampler: Sampler,
        max_new_tokens: int,
        capacity: int | None,
        backend: str,
        threads: int | None,
        engine_weights: str | None = None,
    ) -> None:
        longest = max(len(prompt) for prompt in prompts.ids)
        need = longest + max_new_tokens
        limit = variant.config.max_positions
        if longest > limit:
            raise EngineError(f"a prompt of {longest} tokens is longer than the model's context of {limit}")
        if capacity is not None and capacity > limit:
            raise EngineError(f"--capacity {capacity} is more than the model's context of {limit} tokens; choose up to {limit}")
        rows = min(need, limit) if capacity is None else capacity
        self.prompts, self.sampler, self.variant = prompts, sampler, variant
        self.count = min(max_new_tokens, limit - longest + 1) if capacity is None else max_new_tokens
        self.cut = self.count < max_new_tokens
        started = time.perf_counter()
        self.session = open_session(
            bundle,
            variant,
            backend=backend,
            batch=len(prompts.ids),
            capacity=rows,
            threads=threads,
            engine_weights=engine_weights,
        )
        self.load = time.perf_counter() - started
        self.new: list[list[int]] = [[] for _ in prompts.ids]
        self.seconds: list[float] = []  # of each token, the first after prefill

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.session.close()

    def stream(self) -> Iterator[str]:
        """Pieces of the first sequence's text (or its ids) as soon as they are known."""
        stops = self.variant.config.eos_token_ids
        text = self.prompts.tokenizer.stream() if self.prompts.tokenizer and not self.prompts.as_ids else None
        started = time.perf_counter()
        for tokens in generate(self.session, self.prompts.ids, self.count, self.sampler, stops):
            self.seconds.append(time.perf_counter() - started)
            for row, token in enumerate(tokens):
                if token != ENDED:
                    self.new[row].append(int(token))
            if tokens[0] != ENDED and tokens[0] not in stops:
                yield text.push(int(tokens[0])) if text else f"{tokens[0]} "
            started = time.perf_counter()
        if text:
            yield text.finish()

    @property
    def texts(self) -> list[str] | None:
        """The answers; None where the bundle has no tokenizer."""
        tokenizer = self.prompts.tokenizer
        return [tokenizer.decode(np.array(ids)) for ids in self.new] if tokenizer else None

    def report(self) -> dict[str, Any]:
        first, rest = self.seconds[0], self.seconds[1:]
        return {
            "variant": self.variant.name,
            "prompt_tokens": [len(prompt) for prompt in self.prompts.ids],
            "tokens": self.new,
            "texts": self.texts,
            "load_seconds": self.load,
            "time_to_first_token_seconds": first,
            "seconds_per_token_p50": float(np.median(rest)) if rest else None,
            "kv_bytes": self.session.kv_bytes(),
            "stopped_at_context": self._full,
        }

    def summary(self) -> str:
        figures = self.report()
        each = figures["seconds_per_token_p50"]
        batch = len(self.new)
        what = "token" if batch == 1 else f"step of {batch} tokens"
        speed = f", then {each * 1e3:.1f} ms a {what} ({batch / each:.1f} tokens/s)" if each else ""
        full = f"; stopped at the model's context of {self.variant.config.max_positions} tokens" if self._full else ""
        first = f"opened in {self.load:.2g} s, first token after {figures['time_to_first_token_seconds'] * 1e3:.0f} ms"
        return f"{first}{speed}; {self.variant.name}{full}"

    @property
    def _full(self) -> bool:
        """Whether the model's context ended the generation before what was asked for, or an end token, did."""
        return self.cut and len(self.seconds) == self.count


@dataclass(frozen=True)
class Model:
    """What `eval` scores, with no weight read yet: a bundle's variant, as it decodes, or a checkpoint, in eager torch."""

    path: Path
    source: Bundle | Checkpoint
    config: ModelConfig
    variant: Variant | None = None  # of a bundle

    @classmethod
    def find(cls, path: Path, variant: str | None = None) -> Model:
        """What lies at `path`. Raises BundleError and CheckpointError."""
        if holds_bundle(path):
            bundle = Bundle.open(path)
            chosen = bundle.variant(variant)
            return cls(path, bundle, chosen.config, chosen)
        checkpoint = open_checkpoint(path)
        if variant is not None:
            raise UserError(f"{path} is a checkpoint; --variant names a graph of a bundle")
        return cls(path, checkpoint, checkpoint.config)

    def tokenizer(self) -> Tokenizer:
        if isinstance(self.source, Checkpoint):
            return Tokenizer.from_files(self.source.side_files, str(self.path))
        return Tokenizer.open(self.path)

    def session(self, capacity: int, backend: str, threads: int | None, engine_weights: str | None = None) -> Session:
        """Of batch 1, with room for `capacity` tokens."""
        if isinstance(self.source, Bundle):
            return open_session(
                self.source,
                self.variant,
                backend=backend,
                capacity=capacity,
                threads=threads,
                engine_weights=engine_weights,
            )
        from exporter.engines.torch_eager import open_torch

        return open_torch(self.source, capacity=capacity)


def check_scoring(model: Model, reference: Model | None, window: int) -> None:
    """Refuse, before anything is run, a window past a model's context, and a reference with another vocabulary."""
    for one in (model, reference):
        if one and window > (limit := one.config.max_positions):
            raise EngineError(f"--window {window} is more than the context of {one.path}, {limit} tokens; choose up to {limit}")
    if reference and len(pairs := [one for one in (model, reference) if isinstance(one.config, Seq2SeqConfig)]) == 1:
        raise EngineError(
            f"{pairs[0].path} is an encoder-decoder, and the other of {model.path} and {reference.path} is a decoder; "
            "only models of one kind can be compared"
        )
    if reference and (mine := model.config.vocab_size) != (theirs := reference.config.vocab_size):
        raise EngineError(
            f"{model.path} has a vocabulary of {mine} tokens and its reference {reference.path} one of {theirs}; "
            "only models with the same vocabulary can be compared"
        )
