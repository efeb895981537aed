"""Tiny models with large random weights made by transformers, the independent implementation, and its logits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from once import made_once

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.config import CacheForm
from exporter.export import ExportOptions, export

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 16, "beta_slow": 2, "truncate": False}
PATTERNS: dict[CacheForm, tuple[str, ...]] = {
    "static": ("fused", "grouped", "gqa", "attention", "repeat"),
    "concat": ("grouped", "gqa", "attention", "repeat"),
}
# name → (model_type, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha-gelu": ("llama", {"num_key_value_heads": 6, "hidden_act": "gelu", "head_dim": 12}),
    "llama-glu-llama3": ("llama", {"hidden_act": "sigmoid", "rope_scaling": LLAMA3, "head_dim": 16}),
    "llama-bilinear-linear": ("llama", {"hidden_act": "linear", "rope_scaling": LINEAR, "rope_theta": 5000.0}),
    "llama-mqa-relu-yarn": ("llama", {"num_key_value_heads": 1, "hidden_act": "relu", "rope_scaling": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_scaling": YARN_MSCALE}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biased": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "gemma": ("gemma", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 3}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
}


@cache
def model(name: str) -> Any:
    """One of MODELS, made once."""
    return build(*MODELS[name])


def build(model_type: str, changes: dict[str, Any]) -> Any:
    """A model of `model_type` with SIZES changed, and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes})))


def randomise(theirs: Any, seed: int = 0) -> Any:
    """float32, eager: matrices normal with standard deviation 0.4, vectors 0.3 around what they start as."""
    theirs.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(theirs.float().eval().requires_grad_(False).parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.4 if parameter.dim() > 1 else parameter + noise * 0.3)
    return theirs


def save(name: str, folder: Path, **options: Any) -> Path:
    """The model called `name` as transformers saves it; keyword arguments go to save_pretrained."""
    model(name).save_pretrained(folder / name, **options)
    return folder / name


def bundle(name: str, cache: CacheForm, shared: Path) -> Bundle:
    """The model called `name` in every pattern that has this cache form. `shared` is the fixture of that name."""
    saved = made_once(shared / f"hf-{name}", lambda out: model(name).save_pretrained(out))
    options = ExportOptions(patterns=PATTERNS[cache], cache=cache)
    return Bundle.open(made_once(shared / f"hf-{name}-{cache}", lambda out: export(open_checkpoint(saved), out, options)))


def logits(theirs: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [n, V] after each of `tokens` [n], the whole sequence at once and no cache."""
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()


def greedy(theirs: Any, prompt: np.ndarray, count: int) -> list[int]:
    """The `count` most likely tokens after `prompt` [n], over transformers' own cache.

    Each is the likeliest by more than rounding moves the logits: of two equals another program may rightly take the other.
    """
    ids, past, tokens = torch.from_numpy(prompt)[None], None, []
    with torch.no_grad():
        for _ in range(count):
            out = theirs(ids, past_key_values=past, use_cache=True)
            past, row = out.past_key_values, out.logits[0, -1].float()
            first, second = row.topk(2).values.tolist()
            assert first - second > 4e-4, (len(tokens), first, second)  # twice what the tests of logits allow
            ids = row.argmax()[None, None]
            tokens.append(int(ids))
    return tokens


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of 67 tokens, one a character, beside the model in `folder`; <s> is 1 and </s> is 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    signs = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."]
    core = Tokenizer(models.WordLevel({sign: index for index, sign in enumerate(signs)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(signs[:3])
    core.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }} A {% endfor %}", "utf-8")
