"""Greedy tokens of the C++ runtime against transformers' own: every pattern and cache form, in batches of unequal prompts."""

from __future__ import annotations

from pathlib import Path

import hf
import numpy as np
import pytest
import t5
import test_glu_attention as glu
import torch
from capi import Api
from once import headpool, made_once
from test_families import FAMILIES
from test_t5_sessions import PATTERNS as T5_PATTERNS
from test_turns import columns

from exporter.bundle import Bundle, Variant
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.config import CacheForm
from exporter.engines.torch_eager import open_torch
from exporter.export import ExportOptions, export
from exporter.generate import generate

CACHES: tuple[CacheForm, ...] = ("static", "concat")
LENGTHS = (9, 30, 4)
COUNT = 24
KEPT = 3  # tokens of each prompt that a session is rewound to


def some_prompts(vocab_size: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, vocab_size, length) for length in LENGTHS]


def check(bundle: Bundle, variant: Variant, prompts: list[np.ndarray], expected: list[list[int]], api: Api) -> None:
    """Then from within the prompts again, over caches that hold what came after."""
    opened = api.open(bundle.path, variant.name)
    session = opened.session(batch=len(prompts), capacity=max(map(len, prompts)) + COUNT, chunk=16)
    assert columns(session.generate(prompts, COUNT)) == expected, variant.name
    session.rewind(KEPT)
    assert columns(session.generate([prompt[KEPT:] for prompt in prompts], COUNT)) == expected, variant.name
    session.close()
    opened.close()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, cache: CacheForm, api: Api, shared: Path) -> None:
    prompts, bundle = some_prompts(67), hf.bundle(name, cache, shared)
    expected = [hf.greedy(hf.model(name), prompt, COUNT) for prompt in prompts]
    for variant in bundle.variants:
        check(bundle, variant, prompts, expected, api)


def check_forms(checkpoint: Checkpoint, prompts: list[np.ndarray], expected: list[list[int]], api: Api, folder: Path) -> None:
    for cache in CACHES:
        bundle = export(checkpoint, folder / cache, ExportOptions(patterns=hf.PATTERNS[cache], cache=cache))
        for variant in bundle.variants:
            check(bundle, variant, prompts, expected, api)


def test_glu_attention(api: Api, tmp_path: Path) -> None:
    checkpoint = glu.made(glu.CONFIG, tmp_path)
    theirs, prompts = glu.gated_llama(checkpoint), some_prompts(61)
    check_forms(checkpoint, prompts, [hf.greedy(theirs, prompt, COUNT) for prompt in prompts], api, tmp_path)


def test_learned_positions(api: Api, tmp_path: Path) -> None:
    """A model that transformers does not have: the tokens of torch, each prompt in a session of its own."""
    checkpoint, prompts, expected = glu.made(glu.LEARNED, tmp_path), some_prompts(61), []
    for prompt in prompts:
        with open_torch(checkpoint, capacity=60) as session:
            expected.append([int(tokens[0]) for tokens in generate(session, [prompt], COUNT)])
    check_forms(checkpoint, prompts, expected, api, tmp_path)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_t5(name: str, api: Api, tmp_path: Path) -> None:
    """t5-1.1 is test_t5.py's."""
    sources, checkpoint = [1 + prompt % 66 for prompt in some_prompts(67)], open_checkpoint(t5.save(name, tmp_path))
    with torch.no_grad():
        ids = [torch.from_numpy(source)[None] for source in sources]
        masks = [torch.ones_like(source) for source in ids]
        texts = [
            t5.model(name).generate(source, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)
            for source, mask in zip(ids, masks, strict=True)
        ]
    for cache in CACHES:
        bundle = export(checkpoint, tmp_path / cache, ExportOptions(patterns=T5_PATTERNS, cache=cache))
        for variant in bundle.variants:
            session = api.open(bundle.path, variant.name).session(batch=3, capacity=80)
            for _ in range(2):
                found = columns(session.generate(sources, COUNT, stop_ids=(1,)))
                assert found == [text[0, 1:].tolist() for text in texts], variant.name  # without the start token
                session.reset()


@pytest.fixture(scope="module")
def smollm2_texts(smollm2: Path) -> tuple[list[np.ndarray], list[list[int]]]:
    """Two prompts and what follows, by transformers' own reader of GGUF files."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    prompts = [np.array([504, 3575, 282, 4649, 314]), np.array([2683, 253, 655, 28, 281, 253, 8180, 826, 827, 16037, 28, 665])]
    return prompts, [hf.greedy(theirs, prompt, COUNT) for prompt in prompts]


@pytest.mark.parametrize("cache", CACHES)
def test_smollm2(
    cache: CacheForm,
    smollm2_mha: Path,
    smollm2_bundle: Path,
    smollm2_texts: tuple[list[np.ndarray], list[list[int]]],
    api: Api,
    shared: Path,
) -> None:
    """Of 3 KV heads: 9 that are equal by threes, pooled."""
    here = [variant.pattern for variant in Bundle.open(smollm2_bundle).variants if variant.cache == cache]
    rest = ",".join(pattern for pattern in hf.PATTERNS[cache] if pattern not in here)
    options = ("--groups", 3, "--pattern", rest, "--cache", cache, "--weights", "link")
    other = made_once(shared / f"smollm2-{cache}", lambda out: headpool("export", smollm2_mha, out, *options))
    checked = []
    for bundle in map(Bundle.open, (smollm2_bundle, other)):
        for variant in bundle.variants:
            if variant.cache == cache and variant.groups == 3:
                check(bundle, variant, *smollm2_texts, api)
                checked.append(variant.pattern)
    assert sorted(checked) == sorted(hf.PATTERNS[cache])
