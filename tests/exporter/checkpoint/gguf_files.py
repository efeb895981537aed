"""Tiny GGUF files, made with gguf's own writer, and the model that they hold."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from exporter.checkpoint.gguf_llama import gguf_name

ALPHABET = sorted({*map(chr, range(33, 127)), *"ĠĊé"})
MERGES = ["t h", "th e", "Ġ the", "1 2"]
PLAIN = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TOKENS = ["<unk>", "<s>", "</s>", *PLAIN, "<user>"]
TYPES = [2, 3, 3, *[1] * len(PLAIN), 4]
LLAMA_KEYS = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
    "vocab_size": len(TOKENS),
}
FLOATS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0}


@cache
def llama(tied: bool = False, biased: bool = False):
    """The transformers model that the tiny files hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=tied,
        attention_bias=biased,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in dict.fromkeys(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K: channels i and i + D/2 of a head become neighbours."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def write(
    path: Path, model=None, kind: Kind = Kind.F32, drop: tuple[str, ...] = (), factors=None, tokenizer=True, **changes
) -> Path:
    """A GGUF file of the model; keyword arguments (dots as double underscores) change llama.* keys or tokenizer.ggml.* keys."""
    model = model or llama()
    writer = gguf.GGUFWriter(str(path), changes.pop("architecture", "llama"))
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    ggml = {key: changes.pop(key) for key in list(changes) if key.startswith("tokenizer.")}
    for key, value in {**LLAMA_KEYS, **FLOATS, **changes}.items():
        add = {float: writer.add_float32, str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint32)
        if key not in drop:
            add(f"llama.{key}", value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(ggml.get("tokenizer.pre", "smollm"))
        writer.add_token_list(ggml.get("tokenizer.tokens", TOKENS))
        writer.add_token_types(ggml.get("tokenizer.types", TYPES))
        writer.add_token_merges(ggml.get("tokenizer.merges", MERGES))
        for name, number in (("unk", 0), ("bos", 1), ("eos", 2)):
            getattr(writer, f"add_{name}_token_id")(number)
        if "tokenizer.add_bos" in ggml:
            writer.add_add_bos_token(ggml["tokenizer.add_bos"])
        writer.add_chat_template("{{ messages[0].content }}")
    for name, value in model.state_dict().items():
        if (model.config.tie_word_embeddings and name == "lm_head.weight") or name in drop:
            continue
        array = value.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            array = permute(array, 4 if ".q_proj." in name else 2)
        quantised = kind if array.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
