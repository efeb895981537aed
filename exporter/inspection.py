"""What `headpool inspect` says of a checkpoint, a config or a bundle: one dictionary, and its lines for a person."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from exporter.bundle import MANIFEST, Bundle
from exporter.checkpoint import expected_shapes, open_source
from exporter.config import DTYPE_BYTES, ModelConfig


def inspect(path: Path) -> dict[str, Any]:
    """Sizes in numbers, bytes and tokens. Raises the reader's UserError."""
    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path)
        variants = [{**variant.to_json(), "model": describe(variant.config)} for variant in bundle.variants]
        for variant in variants:
            del variant["config"]
        return {"kind": "bundle", "path": str(path), "source": bundle.source, "tools": bundle.tools, "variants": variants}
    checkpoint = open_source(path)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.weights.values()})
    kind = "checkpoint" if checkpoint.files else "config"
    return {"kind": kind, "path": str(path), "dtypes": dtypes, "model": describe(checkpoint.config)}


def describe(config: ModelConfig) -> dict[str, Any]:
    """The architecture in numbers."""
    sizes = {name: _count(shape) for name, shape in expected_shapes(config).items()}
    return {
        "family": config.family,
        "parameters": sum(sizes.values()),
        "embedding_parameters": sum(size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_heads,
        "kv_heads": list(config.kv_heads),
        "head_dim": config.head_dim,
        "ffn": config.ffn,
        "intermediate_size": config.intermediate_size,
        "norm": config.norm,
        "rope": config.rope.kind,
        "rope_theta": config.rope.theta,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "tied_embedding": config.tied,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "kv_bytes_per_token": {dtype: config.kv_bytes_per_token(dtype) for dtype in DTYPE_BYTES},
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def render(report: dict[str, Any]) -> list[str]:
    if report["kind"] != "bundle":
        return [f"{report['path']}: {report['kind']}, {', '.join(report['dtypes'])}", *_model_lines(report["model"])]
    lines = [f"{report['path']}: bundle of {report['source'].get('name', 'an unnamed checkpoint')}"]
    lines += _model_lines(report["variants"][0]["model"])
    for variant in report["variants"]:
        heads = kv_heads_text(variant["model"]["kv_heads"])
        lines.append(f"  {variant['graph']}: {heads}, {variant['pattern']}, {variant['cache']} cache, {variant['dtype']}")
        lines.append(
            f"    {variant['weight_bytes']:,} bytes of weights and {variant['kv_bytes_per_token']:,} of KV cache a token"
        )
    return lines


def _model_lines(model: dict[str, Any]) -> list[str]:
    kv_bytes = ", ".join(f"{count:,} {dtype}" for dtype, count in model["kv_bytes_per_token"].items() if dtype != "bf16")
    extras = [name for name in ("qk_norm", "qkv_bias", "tied_embedding") if model[name]]
    return [
        f"  {model['family']}: {model['parameters']:,} parameters ({model['embedding_parameters']:,} in embeddings)",
        f"  {model['layers']} layers, d {model['hidden_size']}, {model['query_heads']} query heads of {model['head_dim']}",
        f"  {kv_heads_text(model['kv_heads'])}",
        f"  FFN {model['ffn']} {model['intermediate_size']}, norm {model['norm']}",
        f"  RoPE {model['rope']}, θ {model['rope_theta']:g}",
        f"  vocabulary {model['vocab_size']:,}, context {model['max_positions']:,} tokens"
        + (f", {', '.join(extras).replace('_', ' ')}" if extras else ""),
        f"  KV cache a token, bytes: {kv_bytes}",
    ]


def kv_heads_text(kv_heads: list[int]) -> str:
    """[3, 3, 3, 1] → "3 in layers 0-2, 1 in layer 3"; one number where all layers agree."""
    if len(set(kv_heads)) == 1:
        return f"{kv_heads[0]} KV heads a layer"
    runs = []
    for count, run in groupby(enumerate(kv_heads), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        runs.append(f"{count} in layer{f's {layers[0]}-{layers[-1]}' if len(layers) > 1 else f' {layers[0]}'}")
    return ", ".join(runs)
