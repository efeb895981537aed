"""Tiny T5s with large random weights made by transformers, and what it makes of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import hf
import numpy as np
import torch

SIZES = {
    "vocab_size": 67,
    "d_model": 48,
    "d_kv": 8,  # 6 heads of 8 are 48 as well; t5-wide has other ones
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
UNTIED = {"tie_word_embeddings": False}
# name → (model_type, untied head, what differs from SIZES)
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "t5": ("t5", False, {}),
    "t5-1.1": ("t5", True, {**UNTIED, "feed_forward_proj": "gated-gelu"}),
    "t5-wide": ("t5", True, {**UNTIED, "feed_forward_proj": "gated-silu", "d_kv": 16, "num_decoder_layers": 3}),
    "mt5": ("mt5", True, {**UNTIED, "relative_attention_num_buckets": 32}),
}


@cache
def model(name: str) -> Any:
    """One of MODELS, made once. Its matrices are smaller than a decoder's: T5 does not scale its scores."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    model_type, untied, changes = MODELS[name]
    theirs = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}))
    if untied:
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    hf.randomise(theirs)
    for key, parameter in theirs.named_parameters():
        if "Attention.q.weight" in key:
            parameter.mul_(0.12)
        if "relative_attention_bias" in key:
            parameter.mul_(3)
    if not untied:
        theirs.decoder.final_layer_norm.weight.mul_(6)  # the head's input is scaled by 1/√48
    return theirs


def save(name: str, folder: Path) -> Path:
    """As transformers 5 saves it, but for the config, which old transformers can read as well."""
    model(name).save_pretrained(folder / name)
    return folder / name


def logits(name: str, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float32 [n, V]: after each of the decoder's tokens `target` [n], the encoder having read `source` [E]."""
    with torch.no_grad():
        ids, output = torch.from_numpy(source)[None], torch.from_numpy(target)[None]
        return model(name)(input_ids=ids, decoder_input_ids=output, use_cache=False).logits[0].numpy()
