"""Fewer (or more) KV heads in a T5's decoder, self- and cross-attention, by every method; the encoder is left alone.

That is where "GQA" (Ainslie et al. 2023, arXiv 2305.13245, section 2.2) has it. Nothing rotates, so K folds with any matrix;
the bias of relative positions belongs to query heads and stays. Each kind of attention is shown to the methods as that of a
decoder of its own. What they know of its inputs are the weights of the norm before the projections: for K and V of
cross-attention that is the encoder's last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from exporter.config import ModelConfig
from exporter.errors import UserError
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import LazyTensor, Weights

KINDS = {"self_attn": "input_layernorm", "cross_attn": "cross_layernorm"}  # and the norm that queries have read
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def check_fits(config: ModelConfig, grouping: str, calibration: str | None) -> None:
    """Refuse what does not go with an encoder-decoder.

    Tokens: what its layers read of them is not walked through. The best partition: it puts query heads in another order, and
    the bias of relative positions, which is theirs, is one for all layers.
    """
    if not isinstance(config, Seq2SeqConfig):
        return
    if grouping != "contiguous":
        raise UserError(
            f"grouping {grouping} puts query heads in another order, and the relative positions' bias of a {config.family} is "
            "one for all layers; leave it contiguous"
        )
    if calibration not in (None, "none"):
        raise UserError(
            f"calibration {calibration} is for decoder-only models; an encoder-decoder is converted by its weights alone: "
            "leave it out, or give none"
        )


def default_calibration(config: ModelConfig) -> str:
    """What the methods that fold are given where nobody says: the model's own text, or no tokens."""
    return "none" if isinstance(config, Seq2SeqConfig) else "self"


def attention_views(config: Seq2SeqConfig, weights: Weights) -> Iterator[tuple[dict[str, str], ModelConfig, Weights]]:
    """For self- and for cross-attention: names in the view → names here, and the config and weights of a decoder of it."""
    shared = {field.name for field in dataclasses.fields(ModelConfig)}
    plain = ModelConfig(**{name: getattr(config, name) for name in shared})
    for kind, norm in KINDS.items():
        names = {}
        for layer in range(config.num_layers):
            ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
            for projection in PROJECTIONS:
                names[f"{theirs}.self_attn.{projection}.weight"] = f"{ours}.{kind}.{projection}.weight"
            names[f"{theirs}.input_layernorm.weight"] = f"{ours}.{norm}.weight"
            if kind == "cross_attn":
                names[f"{theirs}.query_layernorm.weight"] = f"{ours}.{norm}.weight"
                names[f"{theirs}.input_layernorm.weight"] = "encoder.norm.weight"
        yield names, plain, {name: weights[own] for name, own in names.items() if own in weights}


def changed(names: dict[str, str], view: Weights, found: Weights) -> dict[str, LazyTensor]:
    """What a method made anew of a view, under the names here."""
    made = {names[name]: tensor for name, tensor in found.items() if tensor is not view[name]}
    return {name: dataclasses.replace(tensor, name=name) for name, tensor in made.items()}
