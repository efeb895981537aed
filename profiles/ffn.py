"""The FFNs of "GLU Variants Improve Transformer" (Shazeer 2020, arXiv 2002.05202) at equal parameters, from one config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from exporter.checkpoint import Checkpoint, expected_shapes
from exporter.checkpoint.random_weights import random_weights
from exporter.config import GATED_FFN_KINDS, ModelConfig
from exporter.errors import UserError
from exporter.seq2seq_config import require_decoder

MULTIPLES = (64, 32, 16, 8, 4, 2, 1)  # 64: whole cache lines and tiles of tensor cores in every dtype
OFF = 0.01  # as far as rounding may take the width from two thirds


def ffn_family(source: Checkpoint, kinds: Sequence[str], seed: int) -> list[Checkpoint]:
    """`source`, a CONFIG, with each of `kinds` as its FFN, its parameters kept, under names that say so.

    Raises UserError for a checkpoint that has weights: they are of one FFN, and for an encoder-decoder.
    """
    if kinds:
        require_decoder(source.config, source.name, "--ffn")
        if source.files:
            raise UserError(
                f"{source.name} has the weights of a {source.config.ffn} FFN; --ffn takes a config.json, without weights"
            )
    return [_with_ffn(source, kind, seed) for kind in kinds]


def _with_ffn(source: Checkpoint, kind: str, seed: int) -> Checkpoint:
    config = dataclasses.replace(source.config, ffn=kind, intermediate_size=equal_width(source.config, kind), family="headpool")
    dtype = source.weights["model.embed_tokens.weight"].dtype
    name = f"{source.name}, {kind} {config.intermediate_size}"
    return dataclasses.replace(source, name=name, config=config, weights=random_weights(config, dtype, seed))


def equal_width(config: ModelConfig, kind: str) -> int:
    """d_ff of an FFN of `kind` with the parameters of `config`'s: section 2 of the paper, two thirds for three matrices.

    Rounded to the largest of MULTIPLES that takes it no further than OFF from the exact width.
    """
    gated = kind in GATED_FFN_KINDS
    if config.gated == gated:
        return config.intermediate_size
    exact = config.intermediate_size * (2 / 3 if gated else 3 / 2)
    rounded = ((multiple, max(multiple, round(exact / multiple) * multiple)) for multiple in MULTIPLES)
    return next(width for multiple, width in rounded if abs(width - exact) <= OFF * exact or multiple == 1)


def ffn_line(model: Checkpoint) -> dict[str, Any]:
    """Kind, d_ff and parameters of a model, in numbers and as one line."""
    counts = {name: math.prod(shape) for name, shape in expected_shapes(model.config).items()}
    total, inside = sum(counts.values()), sum(count for name, count in counts.items() if ".mlp." in name)
    text = f"{model.config.ffn}: d_ff {model.config.intermediate_size:,}, {inside:,} parameters in FFNs, {total:,} in all"
    size = model.config.intermediate_size
    return {"kind": model.config.ffn, "d_ff": size, "ffn_parameters": inside, "parameters": total, "text": text}
