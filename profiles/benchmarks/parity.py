"""Greedy tokens and logits of every pattern and cache form against transformers, on SmolLM2-135M at G = 9 and 3.

Promise: 64 tokens from each of five prompts are identical, in fp32; and in a batch of unequal lengths. Logits are within 2e-4
after a prefill, a chunked prefill and decode steps, of one sequence and of three of unequal lengths. transformers loads the
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
from exporter.config import CACHE_FORMS, CacheForm, ModelConfig
from exporter.convert import convert_checkpoint
from exporter.engines import open_session
from exporter.evaluate import default_text
from exporter.export import ExportOptions, export
from exporter.generate import generate
from exporter.tokenizer import Tokenizer
from graphs.canonical import GroupedAttention, standalone
from graphs.patterns import PATTERNS
from profiles.benchmarks.logits import PATHS, STEPS, differences, transformers_logits
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
LENGTHS = (131, 89, 47)  # tokens of the prompts whose logits are compared: the first alone, then the three as a batch
TOLERANCE = 2e-4  # absolute, on logits
PROMISE = (
    f"{TOKENS} greedy tokens from each of {len(PROMPTS)} prompts identical to transformers, and logits within {TOLERANCE:g} "
    f"({', '.join(PATHS)}; batch 1 and {len(LENGTHS)} of unequal lengths), every pattern and cache form"
)


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


def fitting(config: ModelConfig, cache: CacheForm) -> tuple[str, ...]:
    """The patterns that there are for this cache form in fp32."""
    node = standalone(config.num_heads, config.kv_heads[0], config.head_dim, cache == "static").graph.node(0)
    return tuple(name for name, pattern in PATTERNS.items() if pattern.check(GroupedAttention(node)) is None)


def logit_differences(
    bundle: Bundle, name: str, texts: list[np.ndarray], expected: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """The largest |Δ logits| of each path, for the first of `texts` alone and for all of them as one batch."""
    found = {}
    for batch in (1, len(texts)):
        capacity = max(map(len, texts))
        with open_session(bundle, name, batch=batch, capacity=capacity) as session:
            found[f"batch {batch}"] = differences(session, texts[:batch], expected[:batch])
    return found


def worst(row: dict[str, Any]) -> float:
    """The largest |Δ logits| of a row."""
    return max(value for paths in row["logits"].values() for value in paths.values())


def main() -> None:
    out, model = Path(sys.argv[1]), Path(sys.argv[2])
    checkpoint = open_checkpoint(model)
    tokenizer = Tokenizer.from_files(checkpoint.side_files, checkpoint.name)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    text = tokenizer.encode(default_text()[:8000], special=False)
    ends = np.cumsum([length + STEPS for length in LENGTHS])
    texts = [text[end - length - STEPS : end] for end, length in zip(ends, LENGTHS, strict=True)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        truth, logits = {}, {}
        for groups in GROUPS:
            convert_checkpoint(model, Path(folder) / f"hf{groups}", groups)
            truth[groups] = expected(Path(folder) / f"hf{groups}", prompts)
            reference = transformers_logits(Path(folder) / f"hf{groups}")
            logits[groups] = [reference(sequence) for sequence in texts]
        for cache in CACHE_FORMS:
            options = ExportOptions(groups=GROUPS, patterns=fitting(checkpoint.config, cache), cache=cache)
            bundle = export(checkpoint, Path(folder) / cache, options)
            for variant in bundle.variants:
                groups = variant.config.kv_heads[0]
                one_by_one = [actual(bundle, variant.name, [prompt])[0] for prompt in prompts]
                batch = actual(bundle, variant.name, prompts)
                row: dict[str, Any] = {"groups": groups, "pattern": variant.pattern, "cache": cache}
                row["identical"] = sum(mine == theirs for mine, theirs in zip(one_by_one, truth[groups], strict=True))
                row["identical_in_a_batch"] = sum(mine == theirs for mine, theirs in zip(batch, truth[groups], strict=True))
                row["logits"] = logit_differences(bundle, variant.name, texts, logits[groups])
                row["largest_logit_difference"] = worst(row)
                rows.append(row)
                print(row, flush=True)
    same = all(row["identical"] == row["identical_in_a_batch"] == len(PROMPTS) for row in rows)
    kept = same and all(row["largest_logit_difference"] <= TOLERANCE for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    settings: dict[str, Any] = {"model": checkpoint.name, "prompts": PROMPTS, "tokens": TOKENS, "dtype": "fp32"}
    settings |= {"logits": {"lengths": LENGTHS, "steps": STEPS, "tolerance": TOLERANCE}}
    save(out, "parity", PROMISE, rows, kept, **settings)


if __name__ == "__main__":
    main()
