"""The tensors of a T5: their canonical names and shapes, and what Hugging Face calls them."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.seq2seq_config import Seq2SeqConfig

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
# Copies of the embedding that old checkpoints saved, which have to be what `shared` is.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A bias that the first version of transformers' T5 made and never used.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


def t5_shapes(config: Seq2SeqConfig) -> dict[str, tuple[int, ...]]:
    """Canonical parameter name → shape, in the model's order. Matrices are [out, in]. `lm_head.weight` is absent when tied."""
    d, f, H, D = config.hidden_size, config.intermediate_size, config.num_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}

    def attention(name: str, G: int) -> None:
        shapes[f"{name}.q_proj.weight"] = (H * D, d)
        shapes[f"{name}.k_proj.weight"] = (G * D, d)
        shapes[f"{name}.v_proj.weight"] = (G * config.value_dim, d)
        shapes[f"{name}.o_proj.weight"] = (d, H * config.value_dim)

    for stack, kv_heads in (("encoder", (H,) * config.encoder_layers), ("decoder", config.kv_heads)):
        shapes[f"{stack}.bias.weight"] = (config.relative_buckets, H)
        for layer, G in enumerate(kv_heads):
            prefix = f"{stack}.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (d,)
            attention(f"{prefix}.self_attn", G)
            if stack == "decoder":
                shapes[f"{prefix}.cross_layernorm.weight"] = (d,)
                attention(f"{prefix}.cross_attn", G)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (d,)
            for name in ("gate_proj", "up_proj") if config.gated else ("up_proj",):
                shapes[f"{prefix}.mlp.{name}.weight"] = (f, d)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (d, f)
        shapes[f"{stack}.norm.weight"] = (d,)
    if not config.tied:
        shapes[HEAD] = (config.vocab_size, d)
    return shapes


def t5_layout(config: Seq2SeqConfig) -> dict[str, tuple[str, ...]]:
    """Tensor name in a T5 folder → the canonical tensor it is, as families.layout gives it for decoders."""
    names = dict(_names(config))
    return {names[name]: (name,) for name in t5_shapes(config)}


def _names(config: Seq2SeqConfig) -> Iterator[tuple[str, str]]:
    """Canonical name → Hugging Face's."""
    yield from ((EMBEDDING, EMBEDDING), (HEAD, HEAD))
    up = {"gate_proj": "wi_0", "up_proj": "wi_1"} if config.gated else {"up_proj": "wi"}
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.num_layers)):
        yield f"{stack}.norm.weight", f"{stack}.final_layer_norm.weight"
        yield f"{stack}.bias.weight", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        last = 2 if stack == "decoder" else 1
        for layer in range(layers):
            ours, theirs = f"{stack}.layers.{layer}", f"{stack}.block.{layer}.layer"
            blocks = [(0, "input_layernorm", "self_attn", "SelfAttention", PROJECTIONS)]
            if stack == "decoder":
                blocks.append((1, "cross_layernorm", "cross_attn", "EncDecAttention", PROJECTIONS))
            blocks.append((last, "post_attention_layernorm", "mlp", "DenseReluDense", {**up, "down_proj": "wo"}))
            for index, norm, module, name, parts in blocks:
                yield f"{ours}.{norm}.weight", f"{theirs}.{index}.layer_norm.weight"
                for part, short in parts.items():
                    yield f"{ours}.{module}.{part}.weight", f"{theirs}.{index}.{name}.{short}.weight"


def unread_in_decoding(config: Seq2SeqConfig, name: str) -> bool:
    """Whether a decode step reads nothing, or next to nothing, of this canonical tensor."""
    once = name.startswith("encoder.") or name.endswith(("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"))
    return once or name == (HEAD if config.tied else EMBEDDING)
