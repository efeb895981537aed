"""GGUF metadata of the llama family → the config.json and generation_config.json that say the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from exporter.checkpoint.gguf_file import GgufFile
from exporter.errors import CheckpointError, one_of

ARCHITECTURES = ("llama",)
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
# Keys that change the model, and the values at which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
}
# Llama 3.1's frequency factors are a tensor in GGUF; these are the numbers its makers used (the factor differs).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_config_from(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json. Raises CheckpointError for another architecture or an unknown feature."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{file.path}: {one_of('general.architecture', architecture, ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    for key, harmless in HARMLESS.items():
        if (value := get(key)) is not None and value not in harmless:
            raise CheckpointError(f"{file.path}: {architecture}.{key} {value!r} is not supported")
    hf: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for name, key in SIZES.items():
        hf[name] = _one(file, f"{architecture}.{key}", get(key))
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        if isinstance(given := get(key), list) and len(given) != hf["num_hidden_layers"]:
            raise CheckpointError(
                f"{file.path}: {architecture}.{key} has {len(given)} numbers for {hf['num_hidden_layers']} layers"
            )
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    hf["num_key_value_heads"] = _one(file, f"{architecture}.attention.head_count_kv", get("attention.head_count_kv", heads))
    head_dim = _one(file, f"{architecture}.attention.key_length", get("attention.key_length", hidden // heads))
    if get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: heads of K and V differ in size ({head_dim} and {get('attention.value_length')})")
    hf["head_dim"] = head_dim
    rotary = get("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise CheckpointError(f"{file.path}: RoPE on {rotary} of {head_dim} channels is not part of llama")
    embedding = file.tensors.get("token_embd.weight")
    hf["vocab_size"] = embedding.shape[0] if embedding else get("vocab_size")
    if (vocab := get("vocab_size", hf["vocab_size"])) != hf["vocab_size"]:
        raise CheckpointError(f"{file.path}: vocab_size is {vocab}, token_embd.weight has {hf['vocab_size']} rows")
    hf["hidden_act"] = "silu"
    hf["rms_norm_eps"] = _single(get("attention.layer_norm_rms_epsilon"))
    hf["rope_theta"] = _single(get("rope.freq_base", 10000.0))
    if not isinstance(hf["rope_theta"], float):
        raise CheckpointError(f"{file.path}: {architecture}.rope.freq_base {hf['rope_theta']!r} is not a float")
    hf["rope_scaling"] = _rope_scaling(file, head_dim, hf["rope_theta"])
    hf["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    hf["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    hf["tie_word_embeddings"] = "output.weight" not in file.tensors
    hf["torch_dtype"] = "float32"
    ids = _token_ids(metadata)
    hf.update(ids)
    return hf, ids


def _one(file: GgufFile, key: str, value: Any) -> Any:
    """A number, or the number that a list holds once for every layer."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{file.path}: {key} {value!r} is not one whole number ≥ 1")
    return value


def _single(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in (("bos", "bos"), ("pad", "padding"))
    }
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    unique = list(dict.fromkeys(number for number in ends if number is not None))
    return {**ids, "eos_token_id": unique[0] if len(unique) == 1 else unique or None}


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    prefix = f"{file.metadata['general.architecture']}.rope.scaling."
    factor = _single(file.metadata.get(prefix + "factor"))
    kind = file.metadata.get(prefix + "type", "none" if factor in (None, 0, 1) else "linear")  # as llama.cpp has it
    factors = file.tensors.get("rope_freqs.weight")
    if kind not in ("none", "linear") or (factors and kind != "none"):
        raise CheckpointError(f"{file.path}: {one_of(prefix + 'type', kind, ('none', 'linear'))}")
    if factors:
        return _llama3_scaling(file, head_dim, theta)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """The llama3 scaling whose frequency factors are the file's `rope_freqs.weight`, or a refusal."""
    entry = file.tensors["rope_freqs.weight"]
    try:
        values = np.fromfile(file.path, np.float32, entry.nbytes // 4, offset=entry.offset)
    except OSError as error:
        raise CheckpointError(f"{file.path} cannot be read: {error.strerror or error}") from error
    factor = float(values.max(initial=0.0))
    known = entry.kind.name == "F32" and values.shape == (head_dim // 2,) and math.isfinite(factor) and theta > 1
    wanted = [_llama3_factor(theta ** (-2 * i / head_dim), factor) for i in range(head_dim // 2)] if known else []
    if not known or not np.allclose(values, wanted, rtol=1e-4):
        raise CheckpointError(f"{file.path}: rope_freqs.weight holds frequency factors other than Llama 3's")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _llama3_factor(frequency: float, factor: float) -> float:
    """By how much llama3 scaling divides a frequency (radians a token)."""
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
    if turns > high or factor <= 0:
        return 1.0
    if turns < low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
