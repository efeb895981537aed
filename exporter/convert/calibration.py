"""The tokens that a conversion is measured on: a text's, the model's own, or random ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from exporter.checkpoint import Checkpoint
from exporter.engines.torch_eager import open_torch
from exporter.errors import UserError
from exporter.generate import Sampler, generate
from exporter.tokenizer import TOKENIZER, Tokenizer
from exporter.units import size

CALIBRATIONS = ("self", "random", "none")  # or the path of a text
WINDOWS, WINDOW = 8, 512  # of how many tokens, where the model's context is not shorter
# Random tokens follow Zipf's law with Mandelbrot's offset, p ∝ 1 / (id + OFFSET): tokenizers that merge pairs (BPE) name the
# frequent ones first. Drawn evenly, most would be ones that hardly occur. profiles/benchmarks/conversion.py measures it.
OFFSET = 10

Progress = Callable[[str, int, int], None]  # what, done, total


def calibration_tokens(
    checkpoint: Checkpoint,
    source: str,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    extra: int = 0,
) -> np.ndarray | None:
    """int64 [n,T]: WINDOWS windows of tokens, and `extra` more, to convert `checkpoint` on; None for `none`.

    `self`: what the model writes at temperature 1 after one random token. `random`: drawn by Zipf's law from the vocabulary.
    Anything else is the path of a UTF-8 text, from all over which up to so many windows are taken. Raises UserError for a text
    that cannot be read or is shorter than one window.
    """
    if source == "none":
        return None
    length = min(WINDOW, checkpoint.config.max_positions)
    count = WINDOWS + extra
    vocabulary, rng = checkpoint.config.vocab_size, np.random.default_rng(seed)
    if source == "random":
        odds = 1 / (np.arange(vocabulary) + OFFSET)
        return rng.choice(vocabulary, size=(count, length), p=odds / odds.sum())
    if source == "self":
        return _written(checkpoint, rng.integers(vocabulary, size=(count, length))[:, :1], length, seed, progress)
    return windows(_read(checkpoint, Path(source)), length, count, source)


def windows(ids: np.ndarray, length: int, count: int, what: str) -> np.ndarray:
    """Up to `count` windows of `length` tokens, evenly spread over `ids` [N] and apart from each other."""
    count = min(count, len(ids) // length)
    if not count:
        raise UserError(f"{what} has {len(ids)} tokens, calibration needs at least {length}; choose a longer text, or self")
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts])


def _written(checkpoint: Checkpoint, first: np.ndarray, length: int, seed: int, progress: Progress) -> np.ndarray:
    needed = 4 * sum(math.prod(tensor.shape) for tensor in checkpoint.weights.values())
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{checkpoint.name} cannot write its own calibration text: that needs {size(needed)} of memory, {size(free)} are "
            "free; choose a text, or random"
        )
    columns = [first[:, 0]]
    with open_torch(checkpoint, batch=len(first), capacity=length) as session:
        for tokens in generate(session, list(first), length - 1, Sampler(temperature=1.0, seed=seed)):
            columns.append(tokens)
            progress("sampling calibration text", len(columns), length)
    return np.stack(columns, axis=1)


def _read(checkpoint: Checkpoint, path: Path) -> np.ndarray:
    if TOKENIZER not in checkpoint.side_files:
        raise UserError(f"{checkpoint.name} has no {TOKENIZER}, which {path} is read with; add it, or choose self or random")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(
            f"calibration {str(path)!r} cannot be read: {error.strerror}; choose from {', '.join(CALIBRATIONS)}, or a text file"
        ) from None
    return Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(text, special=False)
