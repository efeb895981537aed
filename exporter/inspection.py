"""What `headpool inspect` says of a checkpoint, a config or a bundle: one dictionary, and its lines for a person."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle, holds_bundle
from exporter.checkpoint import expected_shapes, open_source
from exporter.config import DTYPES, ModelConfig
from exporter.engines.tensorrt import record as engines
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.units import size


def inspect(path: Path) -> dict[str, Any]:
    """Sizes in numbers, bytes and tokens. Raises the reader's UserError."""
    if holds_bundle(path):
        return bundle_report(Bundle.open(path))
    checkpoint = open_source(path)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.weights.values()})
    kind = "checkpoint" if checkpoint.files else "config"
    return {"kind": kind, "path": str(path), "dtypes": dtypes, "model": describe(checkpoint.config)}


def bundle_report(bundle: Bundle) -> dict[str, Any]:
    """What `inspect` says of an opened bundle."""
    variants = [
        {**variant.to_json(), "precision": variant.precision, "model": describe(variant.config)} for variant in bundle.variants
    ]
    for variant in variants:
        del variant["config"]
    report = {"kind": "bundle", "path": str(bundle.path), "source": bundle.source, "tools": bundle.tools, "variants": variants}
    return {**report, "engines": engines.describe(bundle.path)}


def describe(config: ModelConfig) -> dict[str, Any]:
    """The architecture in numbers."""
    counts = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    embeddings = ("embed_", "lm_head", "shared")
    stored = DTYPES if isinstance(config, Seq2SeqConfig) else (*DTYPES, "int8")
    encoder = (
        {
            "encoder_layers": config.encoder_layers,
            "relative_buckets": config.relative_buckets,
            "relative_max_distance": config.relative_max_distance,
        }
        if isinstance(config, Seq2SeqConfig)
        else {}
    )
    return {
        "family": config.family,
        "parameters": sum(counts.values()),
        "embedding_parameters": sum(n for name, n in counts.items() if any(word in name for word in embeddings)),
        "layers": config.num_layers,
        **encoder,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_heads,
        "kv_heads": list(config.kv_heads),
        "head_dim": config.head_dim,
        "value_dim": config.value_dim,
        "gated_values": config.glu_value_dim is not None,
        "ffn": config.ffn,
        "intermediate_size": config.intermediate_size,
        "norm": config.norm,
        "learned_positions": config.learned_positions,
        "rope": config.rope.kind,
        "rope_theta": config.rope.theta,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "tied_embedding": config.tied,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "kv_bytes_per_token": {dtype: config.kv_bytes_per_token(dtype) for dtype in stored},
    }


def render(report: dict[str, Any]) -> list[str]:
    """Lines for a person. Of a bundle, what all its variants are stands on top, and under each what it is besides."""
    if report["kind"] != "bundle":
        model = report["model"]
        kv_bytes = ", ".join(f"{size(count)} in {dtype}" for dtype, count in model["kv_bytes_per_token"].items())
        return [
            f"{report['path']}: {report['kind']}, {', '.join(report['dtypes'])}",
            f"  {model['parameters']:,} parameters ({model['embedding_parameters']:,} in embeddings)",
            f"  {kv_heads_text(model['kv_heads'])}",
            *_architecture(model),
            f"  KV cache a token: {kv_bytes}",
        ]
    variants = report["variants"]
    described = [_architecture(variant["model"]) for variant in variants]
    common = [line for line in described[0] if all(line in lines for lines in described)]
    graphs = f"{len(variants)} graph{'s' * (len(variants) > 1)}"
    lines = [f"{report['path']}: bundle of {report['source'].get('name', 'an unnamed checkpoint')}, {graphs}", *common]
    for variant, own in zip(variants, described, strict=True):
        lines += [*variant_lines(variant), *(f"  {line}" for line in own if line not in common)]
    return [*lines, *engines.render(report["engines"])]


def variant_lines(variant: dict[str, Any]) -> list[str]:
    """One graph of a bundle's report: what it is, and its sizes."""
    heads = kv_heads_text(variant["model"]["kv_heads"])
    return [
        f"  {variant['graph']}: {heads}, {variant['pattern']}, {variant['cache']} cache, {variant['precision']}",
        f"    {variant['model']['parameters']:,} parameters; a token reads {size(variant['weight_bytes'])} of weights "
        f"and takes {size(variant['kv_bytes_per_token'])} of KV cache",
    ]


def _architecture(model: dict[str, Any]) -> list[str]:
    """What fewer KV heads do not change."""
    extras = [name for name in ("qk_norm", "qkv_bias", "tied_embedding") if model[name]]
    layers, positions = f"{model['layers']} layers", _positions(model)
    context = f"context {model['max_positions']:,} tokens"
    if "encoder_layers" in model:
        layers = f"{model['encoder_layers']} encoder and {model['layers']} decoder layers"
        positions = f"relative positions in {model['relative_buckets']} buckets up to {model['relative_max_distance']} tokens"
        context = "a context of any length"
    return [
        f"  {model['family']}: {layers}, d {model['hidden_size']}, {model['query_heads']} query heads of "
        f"{model['head_dim']}" + (f", GLU attention with values of {model['value_dim']}" if model["gated_values"] else ""),
        f"  FFN {model['ffn']} {model['intermediate_size']}, norm {model['norm']}",
        f"  {positions}",
        f"  vocabulary {model['vocab_size']:,}, {context}" + (f", {', '.join(extras).replace('_', ' ')}" if extras else ""),
    ]


def _positions(model: dict[str, Any]) -> str:
    if model["rope"] != "none":
        return f"RoPE {model['rope']}, θ {model['rope_theta']:g}"
    return "learned positions" if model["learned_positions"] else "no positions"


def kv_heads_text(kv_heads: list[int]) -> str:
    """[3, 3, 3, 1] → "3 in layers 0-2, 1 in layer 3"; one number where all layers agree."""
    if len(set(kv_heads)) == 1:
        return f"{kv_heads[0]} KV head{'s' * (kv_heads[0] > 1)} a layer"
    runs = []
    for count, run in groupby(enumerate(kv_heads), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        runs.append(f"{count} in layer{f's {layers[0]}-{layers[-1]}' if len(layers) > 1 else f' {layers[0]}'}")
    return ", ".join(runs)
