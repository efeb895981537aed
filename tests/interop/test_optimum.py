"""optimum's ORTModelForCausalLM generates transformers' tokens from a concat bundle."""

from __future__ import annotations

import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM


@pytest.fixture(params=["grouped", "gqa", "repeat", "attention"])
def model(request, folder, groups):
    return ORTModelForCausalLM.from_pretrained(folder / f"g{groups}.{request.param}.concat")


def generate(model, ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> list[list[int]]:
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return out[:, ids.shape[1] :].tolist()


def test_one_prompt_at_a_time(model, expected):
    for prompt, wanted in zip(expected.prompts, expected.continuations, strict=True):
        ids = torch.tensor([prompt])
        assert generate(model, ids, torch.ones_like(ids), 64) == [wanted]


def test_left_padded_batch(model, expected):
    width, rows = max(map(len, expected.prompts)), len(expected.prompts)
    ids, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
    for row, prompt in enumerate(expected.prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    found = generate(model, ids, mask, 64)
    for row, wanted in zip(found, expected.continuations, strict=True):
        assert row[: len(wanted)] == wanted  # a row that ended goes on with padding until the longest has ended
