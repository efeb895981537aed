"""What a config.json may say that headpool has not, and the one line that names it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exporter.checkpoint.families import FAMILIES
from exporter.checkpoint.hf_config import hf_config_for, parse_config
from exporter.decode import parse
from exporter.errors import CheckpointError
from exporter.models.rope import frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}

ACTIVATIONS = "silu, swish, gelu, gelu_pytorch_tanh, gelu_new, relu, sigmoid, linear"

WINDOW = (
    "sliding_window 64 is shorter than max_position_embeddings 128, and sliding windows are not supported; "
    "set max_position_embeddings to 64 in config.json to use the model up to there"
)

SLIDING = ["full_attention", "sliding_attention"]

REFUSED = [
    ({"model_type": "mixtral"}, f"model_type 'mixtral' is not one of {', '.join(FAMILIES)}"),
    ({"model_type": ["llama"]}, f"model_type ['llama'] is not one of {', '.join(FAMILIES)}"),
    ({"hidden_act": "quick_gelu"}, f"hidden_act 'quick_gelu' is not one of {ACTIVATIONS}"),
    (
        {"model_type": "starcoder2", "hidden_act": "sigmoid"},
        "hidden_act 'sigmoid' is not one of silu, swish, gelu, gelu_pytorch_tanh, gelu_new, relu",
    ),
    (
        {"model_type": "gemma", "hidden_activation": "relu"},
        "hidden_activation 'relu' contradicts hidden_act 'gelu_pytorch_tanh'",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "RoPE scaling 'dynamic' is not one of default, linear, llama3, yarn",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
        "RoPE scaling 'longrope' is not one of default, linear, llama3, yarn",
    ),
    ({"model_type": "phi3", "rope_scaling": {"type": "yarn"}}, "RoPE scaling 'yarn' is not one of default"),
    ({"rope_parameters": {"rope_type": "linear"}}, "RoPE scaling linear needs factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling llama3 needs low_freq_factor"),
    ({"rope_scaling": {"mrope_section": [1]}}, "RoPE parameters mrope_section are not supported"),
    ({"rope_scaling": "yarn"}, "RoPE parameters 'yarn' are not a JSON object"),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 1e-45}},
        "the numbers of RoPE scaling linear give frequencies that are not finite",
    ),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "false"}}, "RoPE truncate 'false' is not true or false"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "RoPE truncate 1 is not true or false"),
    ({"rope_theta": "many"}, "RoPE rope_theta 'many' is not a finite number"),
    ({"rope_theta": -1.0}, "rope theta -1.0 is not positive"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not part of llama"),
    ({"model_type": "mistral", "sliding_window": 64}, WINDOW),
    ({"model_type": "mistral", "sliding_window": 127}, WINDOW.replace("64", "127")),
    ({"model_type": "phi3", "sliding_window": 64}, WINDOW),
    ({"model_type": "starcoder2", "sliding_window": 64}, WINDOW),
    ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, WINDOW),
    ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "layer_types": SLIDING}, WINDOW),
    (
        {"model_type": "qwen3", "sliding_window": 64, "layer_types": SLIDING},
        "layer_types has sliding_attention, but use_sliding_window is off",
    ),
    (
        {"model_type": "qwen2", "layer_types": ["linear_attention"]},
        "layer_types ['linear_attention'] is not a list of full_attention and sliding_attention",
    ),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config 'gptq' is not supported; use the checkpoint's F32, F16 or BF16 weights",
    ),
    ({"num_local_experts": 8}, "num_local_experts 8 is not supported; headpool exports dense causal decoders and T5"),
    (
        {"model_type": "gemma", "use_bidirectional_attention": True},
        "use_bidirectional_attention True is not supported; headpool exports dense causal decoders and T5",
    ),
    ({"is_causal": False}, "is_causal False is not supported; headpool exports dense causal decoders and T5"),
    ({"num_key_value_heads": 4}, "layer 0: 4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"),
    ({"num_key_value_heads": [2, 3]}, "num_key_value_heads [2, 3] is not a whole number from 1 to 2147483647"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not a whole number from 1 to 4096"),
    ({"hidden_size": "48"}, "hidden_size '48' is not a whole number from 1 to 2147483647"),
    ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 6, and there is no head_dim"),
    ({"head_dim": 9}, "rope rotates 9 of 9 channels; RoPE needs an even number"),
    ({"rms_norm_eps": None}, "rms_norm_eps None is not a finite number"),
    ({"rms_norm_eps": 10**400}, f"rms_norm_eps {10**400} is not a finite number"),
    ({"attention_bias": "yes"}, "attention_bias 'yes' is neither true nor false"),
    ({"eos_token_id": "</s>"}, "eos_token_id '</s>' is neither a token id nor a list of them"),
]

ACCEPTED = [
    {"model_type": "mistral", "sliding_window": 128},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "mistral"},  # transformers puts in 4096
    {"model_type": "qwen2", "sliding_window": 64},  # use_sliding_window is off
    {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2},
    {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    {"sliding_window": 64},  # llama has none
    {"partial_rotary_factor": 1.0},
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_by_name(changes, text):
    heads = {} if changes.get("model_type", "llama") in ("llama", "phi3") else {"num_key_value_heads": 2, "head_dim": 8}
    with pytest.raises(CheckpointError) as error:
        parse_config({**LLAMA, **heads, **changes}, where="here")
    assert str(error.value) == f"here: {text}"


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_harmless_settings_are_accepted(changes):
    parse_config({**LLAMA, "num_key_value_heads": 2, "head_dim": 8, **changes})


@pytest.mark.parametrize("given", [{"truncate": None}, {"truncate": True}, {"original_max_position_embeddings": 64}])
def test_yarn_is_read_as_transformers_reads_it(given):
    """A null `truncate` is false there; an original length beside the parameters comes before the one among them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, **given}
    top = {"original_max_position_embeddings": 32} if "original_max_position_embeddings" in given else {}
    hf = {**LLAMA, "head_dim": 64, "rope_theta": 10000.0, "rope_scaling": scaling, **top}
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**hf), "cpu")
    torch.testing.assert_close(frequencies(parse_config(hf))[0], theirs)


def test_token_ids_that_a_config_leaves_out():
    """Those of transformers' config class."""
    from transformers import AutoConfig

    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"):
        theirs = AutoConfig.for_model(model_type)
        heads = {"num_key_value_heads": 2, "head_dim": 8}
        ours = parse_config({**LLAMA, **heads, "model_type": model_type, "vocab_size": 40000})
        ends = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
        assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, ends), model_type


def test_old_gemma_activation_is_the_tanh_one():
    config = parse_config({**LLAMA, "model_type": "gemma", "num_key_value_heads": 2, "hidden_act": "gelu"})
    assert (config.ffn, config.gelu_tanh, config.head_dim, config.tied) == ("geglu", True, 256, True)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_a_missing_size(key):
    with pytest.raises(CheckpointError) as error:
        parse_config({name: value for name, value in LLAMA.items() if name != key})
    assert str(error.value) == f"config.json: lacks {key}"


WORDS = ["full_attention", "sliding_attention", "llama3", "yarn", "linear", "default", "gelu", "relu", "sigmoid", "1e3"]

ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "mscale", "truncate", "x"]

ODD = [10**400, 2**31, 5e-324, 1e308, math.inf, math.nan]

NUMBERS = st.integers(-3, 300) | st.integers() | st.floats() | st.sampled_from(ODD)

JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=6),
    max_leaves=8,
)

KEYS = [
    *(*LLAMA, "head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window"),
    *("layer_types", "max_window_layers", "use_sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
    *("hidden_act", "hidden_activation", "rms_norm_eps", "norm_epsilon", "attention_bias", "mlp_bias", "use_bias"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config", "num_experts"),
]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(["bos_token_id", "eos_token_id"]), JSON),
)
@example({"bos_token_id": False}, "gemma", {"bos_token_id": []})
@example({"rope_theta": math.inf}, "llama", {})
@example({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": math.nan}}, "llama", {})
def test_any_config_is_parsed_or_refused_in_one_line(changes, model_type, generation):
    """What is parsed has a config of ours that survives JSON, finite frequencies, and a config.json that says it again."""
    hf_config = {**LLAMA, "model_type": model_type, "num_key_value_heads": 2, **changes}
    try:
        config = parse_config(hf_config, generation)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  it need not be refused
        return
    assert type(config).from_json(parse(json.dumps(config.to_json()))) == config
    if config.head_dim < 1000:
        values, factor = frequencies(config)
        assert torch.isfinite(values).all()
        assert math.isfinite(factor)
    assert parse_config(hf_config_for(config, hf_config, torch.float32), generation) == config
