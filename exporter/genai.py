"""genai_config.json: what onnxruntime-genai's `Model` reads beside the graph.

Its documented fields are those of onnxruntime-genai 0.18 (src/config.h). It knows one KV-head count for all layers.
"""

from __future__ import annotations

from typing import Any

from exporter.bundle import Variant


def genai_config(variant: Variant) -> dict[str, Any]:
    """The configuration that makes `variant` a genai model: `gqa` static shares its buffers, the concat form does not."""
    config, static = variant.config, variant.cache == "static"
    inputs = {binding.name: binding.name for binding in variant.inputs() if binding.role != "cache"}
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outputs = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    eos = list(config.eos_token_ids) or [0]
    return {
        "model": {
            "type": "llama",  # genai's name for a decoder with these inputs, whatever the family
            "vocab_size": config.vocab_size,
            "context_length": config.max_positions,
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else eos[0],
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": eos[0],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": variant.graph,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": max(config.kv_heads),
                "num_hidden_layers": config.num_layers,
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_positions,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": static,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
