"""The weights that every runtime gets: random ones of a config with G KV heads, as a Hugging Face folder and as a GGUF file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tokenizers
import torch

from exporter.checkpoint import open_source
from exporter.checkpoint.random_weights import random_weights
from exporter.checkpoint.writer import write_checkpoint
from exporter.config import ModelConfig
from exporter.files import new_file, new_folder

GGUF = "model.gguf"
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make_checkpoint(config: Path, groups: int, out: Path) -> None:
    """Write the folder `out`: what `config` describes, with `groups` KV heads, and the same as GGUF in it. fp32."""
    source = open_source(config)
    shape = source.config.with_kv_heads((groups,) * source.config.num_layers)
    weights = random_weights(shape, torch.float32, seed=0)
    with new_folder(out) as folder:
        made = folder / "huggingface"
        write_checkpoint(dataclasses.replace(source, config=shape, weights=weights), made)
        _write_tokenizer(made, shape)
        write_gguf(made, shape, folder / GGUF)


def write_gguf(checkpoint: Path, config: ModelConfig, out: Path) -> None:
    """The Llama in the folder `checkpoint` as fp32 GGUF without a tokenizer, its Q and K rows in the order that format has."""
    import gguf
    from safetensors import safe_open

    with new_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_context_length(config.max_positions)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.kv_heads[0])
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("none")
        with safe_open(checkpoint / "model.safetensors", "np") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                writer.add_tensor(_gguf_name(name), _gguf_rows(name, file.get_tensor(name), config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in GGUF_ENDS:
        return f"{GGUF_ENDS[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def _gguf_rows(name: str, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of Q and K from halves (row i turns with row i + D/2) to neighbours (2i with 2i + 1)."""
    heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads[0]}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, config.head_dim // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Bytes as tokens: some exporters refuse a model without a tokenizer. Nothing is ever tokenised."""
    core = tokenizers.ByteLevelBPETokenizer()
    core.train_from_iterator([""], vocab_size=min(config.vocab_size, 258), special_tokens=["<s>", "</s>"], show_progress=False)
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
