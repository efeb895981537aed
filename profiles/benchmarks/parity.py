"""Greedy tokens of every pattern and cache form against transformers, on SmolLM2-135M at G = 9 and 3.

Promise: 64 tokens from each of five prompts are identical, in fp32; and in a batch of unequal lengths. transformers loads the
Hugging Face checkpoint that `headpool convert` wrote; headpool runs the exported bundle on ONNX Runtime.

    python -m profiles.benchmarks.parity OUT.json MODEL.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.config import CACHE_FORMS
from exporter.convert import convert_checkpoint
from exporter.engines import open_session
from exporter.export import ExportOptions, export
from exporter.generate import generate
from exporter.tokenizer import Tokenizer
from graphs.patterns import PATTERNS
from profiles.benchmarks.record import save

GROUPS = (9, 3)
TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village between two rivers, there lived an old clockmaker who",
    "The three most important properties of a good measurement are",
    "Water boils at 100 degrees Celsius because",
)
PROMISE = f"{TOKENS} greedy tokens from each of {len(PROMPTS)} prompts identical to transformers, every pattern and cache form"


def expected(folder: Path, prompts: list[np.ndarray]) -> list[list[int]]:
    """transformers' greedy tokens; generation does not stop at the end token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def actual(bundle: Bundle, name: str, prompts: list[np.ndarray]) -> list[list[int]]:
    """headpool's greedy tokens of `prompts` as one batch."""
    capacity = max(map(len, prompts)) + TOKENS
    with open_session(bundle, name, batch=len(prompts), capacity=capacity) as session:
        return np.stack(list(generate(session, prompts, TOKENS)), axis=1).tolist()


def main() -> None:
    out, model = Path(sys.argv[1]), Path(sys.argv[2])
    checkpoint = open_checkpoint(model)
    tokenizer = Tokenizer.from_files(checkpoint.side_files, checkpoint.name)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        truth = {}
        for groups in GROUPS:
            convert_checkpoint(model, Path(folder) / f"hf{groups}", groups)
            truth[groups] = expected(Path(folder) / f"hf{groups}", prompts)
        for cache in CACHE_FORMS:
            options = ExportOptions(groups=GROUPS, patterns=tuple(PATTERNS), cache=cache)
            bundle = export(checkpoint, Path(folder) / cache, options)
            for variant in bundle.variants:
                groups = variant.config.kv_heads[0]
                one_by_one = [actual(bundle, variant.name, [prompt])[0] for prompt in prompts]
                batch = actual(bundle, variant.name, prompts)
                row = {"groups": groups, "pattern": variant.pattern, "cache": cache}
                row["identical"] = sum(mine == theirs for mine, theirs in zip(one_by_one, truth[groups], strict=True))
                row["identical_in_a_batch"] = sum(mine == theirs for mine, theirs in zip(batch, truth[groups], strict=True))
                rows.append(row)
                print(row, flush=True)
    kept = all(row["identical"] == row["identical_in_a_batch"] == len(PROMPTS) for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "parity", PROMISE, rows, kept, model=checkpoint.name, prompts=PROMPTS, tokens=TOKENS, dtype="fp32")


if __name__ == "__main__":
    main()
