"""Which tensors a model has: the canonical names and shapes, and the check of what was found against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporter.checkpoint.t5_names import t5_shapes
from exporter.config import ModelConfig
from exporter.errors import CheckpointError
from exporter.seq2seq_config import Seq2SeqConfig

EMBEDDING, POSITIONS, HEAD = "model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"  # of a decoder
SHOWN = 5  # names of one kind that an error line lists


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical parameter name → shape, in the model's order. Matrices are [out, in]. `lm_head.weight` is absent when tied."""
    if isinstance(config, Seq2SeqConfig):
        return t5_shapes(config)
    d, f, H, D, Dv = config.hidden_size, config.intermediate_size, config.num_heads, config.head_dim, config.value_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}

    if config.learned_positions:
        shapes[POSITIONS] = (config.max_positions, d)

    def norm(name: str, size: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (size,)
        if bias:
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    layer_norm = config.norm == "layer"
    for layer, G in enumerate(config.kv_heads):
        prefix = f"model.layers.{layer}."
        norm(prefix + "input_layernorm", d, layer_norm)
        linear(prefix + "self_attn.q_proj", H * D, d, config.qkv_bias)
        linear(prefix + "self_attn.k_proj", G * D, d, config.qkv_bias)
        linear(prefix + "self_attn.v_proj", G * Dv, d, config.qkv_bias)
        if config.glu_value_dim is not None:
            linear(prefix + "self_attn.v_gate_proj", G * Dv, d, config.qkv_bias)
        linear(prefix + "self_attn.o_proj", d, H * Dv, config.o_bias)
        if config.qk_norm:
            norm(prefix + "self_attn.q_norm", D, bias=False)
            norm(prefix + "self_attn.k_norm", D, bias=False)
        norm(prefix + "post_attention_layernorm", d, layer_norm)
        if config.gated:
            linear(prefix + "mlp.gate_proj", f, d, config.ffn_bias)
        linear(prefix + "mlp.up_proj", f, d, config.ffn_bias)
        linear(prefix + "mlp.down_proj", d, f, config.ffn_bias)
    norm("model.norm", d, layer_norm)
    if not config.tied:
        shapes[HEAD] = (config.vocab_size, d)
    return shapes


def check_tensors(
    where: object, family: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse missing, misshapen and unknown tensors together, in one line. `found` holds no name that may be ignored."""
    complaints = []
    if missing := [name for name in wanted if name not in found]:
        complaints.append(f"{len(missing)} missing ({listing(missing)})")
    if unknown := [name for name in found if name not in wanted]:
        complaints.append(f"{len(unknown)} not part of {family} ({listing(unknown)})")
    misshapen = [
        f"{name} is {list(found[name])}, its config says {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if misshapen:
        complaints.append(f"{len(misshapen)} of the wrong shape ({listing(misshapen)})")
    if complaints:
        raise CheckpointError(f"{where}: tensors do not fit its config: {'; '.join(complaints)}")


def listing(names: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    rest = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
