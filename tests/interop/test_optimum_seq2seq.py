"""optimum's ORTModelForSeq2SeqLM generates transformers' tokens, greedy and beams, from concat bundles of a T5, MHA and GQA.

HEADPOOL_INTEROP also holds t5-g6, a T5 with as many KV heads as query heads, t5-g2, the same with 2 KV heads, which
transformers has no key for, t5-g2x6, those repeated, which it reads, and the bundles t5-g{G}.{pattern}.
"""

from __future__ import annotations

import pytest
import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM

# Of unequal lengths; the shorter one is padded.
IDS = torch.tensor([[7, 21, 9, 44, 3, 60, 18], [33, 2, 51, 8, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module", params=[("t5-g6", "t5-g6"), ("t5-g2", "t5-g2x6")], ids=["MHA", "GQA"])
def kind(request):
    return request.param


@pytest.mark.parametrize("pattern", ["grouped", "gqa", "repeat", "attention"])
@pytest.mark.parametrize("beams", [1, 4])
def test_tokens(pattern, beams, kind, folder):
    bundle, checkpoint = kind
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder / checkpoint, dtype=torch.float32).eval()
    ours = ORTModelForSeq2SeqLM.from_pretrained(folder / f"{bundle}.{pattern}")
    assert ours.config.decoder_start_token_id == theirs.config.decoder_start_token_id
    how = {"attention_mask": MASK, "max_new_tokens": 32, "num_beams": beams, "do_sample": False}
    wanted = theirs.generate(IDS, **how)
    assert len(set(wanted[0].tolist())) > 3
    assert ours.generate(IDS, **how).tolist() == wanted.tolist()
