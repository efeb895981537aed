"""The bundles that scripts/interop exported, and what transformers generates from the checkpoint each was exported from.

Runs in .venv-interop, where headpool is not installed. HEADPOOL_INTEROP names the folder with, for G = 9 and 3, the
Hugging Face checkpoint g{G} and the bundles g{G}.{pattern}.{cache}.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who",
)
NEW_TOKENS = 64


@dataclass(frozen=True)
class Expected:
    """Token ids of each prompt, and the greedy continuation of each alone, in float32."""

    prompts: list[list[int]]
    continuations: list[list[int]]


@pytest.fixture(scope="session")
def folder() -> Path:
    if "HEADPOOL_INTEROP" not in os.environ:
        pytest.exit("HEADPOOL_INTEROP is not set; run scripts/interop, which exports the bundles", returncode=2)
    return Path(os.environ["HEADPOOL_INTEROP"])


@pytest.fixture(scope="session", params=[9, 3], ids=lambda groups: f"G={groups}")
def groups(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def expected(folder: Path, groups: int) -> Expected:
    model = AutoModelForCausalLM.from_pretrained(folder / f"g{groups}", dtype=torch.float32)
    assert model.config.num_key_value_heads == groups
    tokenizer = AutoTokenizer.from_pretrained(folder / f"g{groups}")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 1
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        continuations.append(out[0, len(prompt) :].tolist())
    assert "Paris" in tokenizer.decode(continuations[0]), "the checkpoint itself is wrong"
    return Expected(prompts, continuations)
