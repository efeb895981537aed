"""The checkpoint families: one entry each for what its config.json and tensor names do differently from Llama's.

`names` is the family's name map, read in both directions: a module of the checkpoint → the canonical modules whose rows it
holds, in order. A module that is not listed has the same name on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from exporter.checkpoint.expected import expected_shapes
from exporter.checkpoint.t5_names import t5_layout
from exporter.config import ModelConfig
from exporter.seq2seq_config import Seq2SeqConfig

# hidden_act → (ungated FFN, gated FFN, tanh approximation of GELU)
ACTIVATIONS = {
    "silu": ("swish", "swiglu", False),
    "swish": ("swish", "swiglu", False),
    "gelu": ("gelu", "geglu", False),
    "gelu_pytorch_tanh": ("gelu", "geglu", True),
    "gelu_new": ("gelu", "geglu", True),
    "relu": ("relu", "reglu", False),
    "sigmoid": (None, "glu", False),
    "linear": (None, "bilinear", False),
}


@dataclass(frozen=True)
class Family:
    """What transformers' config and model classes of one `model_type` do. A bias is on, off, or named by a config key."""

    model_type: str
    architecture: str
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the config class fills in where config.json is silent
    eps_key: str = "rms_norm_eps"
    norm: str = "rms"
    norm_offset: bool = False
    scaled_embeddings: bool = False
    gated: bool = True
    qk_norm: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    ffn_bias: bool | str = False
    window: Literal["none", "all", "layers"] = "none"  # which layers obey sliding_window
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    partial_rotary: bool = False
    seq2seq: bool = False  # an encoder-decoder: exporter/checkpoint/t5_config.py, t5_names.py


_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    defaults={**_COMMON, **_ENDS, "max_position_embeddings": 2048},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    ffn_bias="mlp_bias",
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    defaults={**_COMMON, **_ENDS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    window="all",
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults={**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    qkv_bias=True,
    window="layers",
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    window="layers",
)
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    defaults={
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    norm_offset=True,
    scaled_embeddings=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    names={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    defaults={**_COMMON, "bos_token_id": 1, "eos_token_id": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    window="all",
    rope_kinds=("default",),  # transformers reads Phi-3's "yarn" and "su" as longrope
    partial_rotary=True,
)
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    names={"mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",)},
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "use_bias": True,
    },
    eps_key="norm_epsilon",
    norm="layer",
    gated=False,
    qkv_bias="use_bias",
    o_bias="use_bias",
    ffn_bias="use_bias",
    window="all",
)

_T5_COMMON: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    defaults={
        **_T5_COMMON,
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
    seq2seq=True,
)
MT5 = Family(
    "mt5",
    "MT5ForConditionalGeneration",
    defaults={
        **_T5_COMMON,
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    seq2seq=True,
)

# Models that transformers has no class for, in headpool's own words (exporter/checkpoint/own_config.py). Value and gate of GLU
# attention are the one matrix they are in the paper (arXiv 2507.00022), all value heads first.
HEADPOOL = Family("headpool", "HeadpoolForCausalLM", names={"self_attn.v_proj": ("self_attn.v_proj", "self_attn.v_gate_proj")})

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, PHI3, STARCODER2, T5, MT5, HEADPOOL)}


def layout(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Tensor name in `config.family`'s checkpoints → the canonical tensors whose rows it holds, in order."""
    if isinstance(config, Seq2SeqConfig):
        return t5_layout(config)
    holder = {
        part: (module, index) for module, parts in FAMILIES[config.family].names.items() for index, part in enumerate(parts)
    }
    held: dict[str, dict[int, str]] = {}
    for name in expected_shapes(config):
        stem, kind = name.rsplit(".", 1)
        head, module = _split_layer(stem)
        outer, index = holder.get(module, (module, 0))
        held.setdefault(f"{head}{outer}.{kind}", {})[index] = name
    return {name: tuple(parts[index] for index in sorted(parts)) for name, parts in held.items()}


def _split_layer(stem: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj → (model.layers.3., mlp.up_proj); a module outside the layers stays whole."""
    pieces = stem.split(".", 3)
    return (".".join(pieces[:3]) + ".", pieces[3]) if pieces[:2] == ["model", "layers"] else ("", stem)
