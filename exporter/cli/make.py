"""`headpool convert` and `headpool export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.console import finish, human_bytes, progress_bar


@click.command("convert")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--groups", "count", type=click.IntRange(min=1), required=True, help="KV heads G of every layer after.")
@options.all_of(options.method, options.seed, options.as_json)
def convert_command(checkpoint: Path, out: Path, count: int, method: Any, seed: int, as_json: bool) -> None:
    """Write CHECKPOINT (a Hugging Face folder or a GGUF file) to the folder OUT with G KV heads a layer.

    Fewer heads are pooled, group by group, as in the GQA paper; more heads repeat the ones there are, exactly.
    OUT is a Hugging Face checkpoint that transformers loads.

    \b
    Examples:
      headpool convert llama/ llama-gqa8 --groups 8
      headpool convert model.gguf mqa --groups 1 --method first --json
    """
    from exporter.convert import conversion_record, convert_checkpoint

    with progress_bar() as progress:
        before, after = convert_checkpoint(checkpoint, out, count, method, seed, progress)
    record = conversion_record(before, after, method, seed)
    data = {"out": str(out), "conversion": record, "kv_heads": list(after.kv_heads)}
    finish(
        as_json,
        data,
        f"{out}: {before.kv_heads[0]} → {after.kv_heads[0]} KV heads of {after.num_heads} query heads, by {method}",
    )


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@options.all_of(
    options.groups,
    options.method,
    options.patterns,
    options.cache,
    options.dtype,
    options.storage,
    options.seed,
    options.as_json,
)
@click.option("--logits", type=click.Choice(("last", "all")), default="last", show_default=True, help="Of which positions.")
def export_command(
    checkpoint: Path,
    out: Path,
    groups: tuple[int, ...] | None,
    method: Any,
    patterns: tuple[str, ...],
    cache: Any,
    dtype: str,
    storage: Any,
    seed: int,
    as_json: bool,
    logits: Any,
) -> None:
    """Export CHECKPOINT (a Hugging Face folder, a GGUF file, or a config.json for random weights) to the bundle OUT.

    One graph for each KV-head count and pattern; weights that graphs share stand once.

    \b
    Examples:
      headpool export llama/ bundle
      headpool export llama/ bundle --groups 32,8,1 --pattern grouped,gqa --dtype fp16 --weights link
      headpool export llama/ for-optimum --pattern gqa --cache concat
    """
    from exporter.checkpoint import open_source
    from exporter.export import ExportOptions, export

    chosen = ExportOptions(groups, method, seed, patterns, cache, dtype, logits, storage)
    with progress_bar() as progress:
        bundle = export(open_source(checkpoint, seed), out, chosen, progress)
    lines = [f"{out}: {len(bundle.variants)} graph{'s' * (len(bundle.variants) > 1)}"]
    for variant in bundle.variants:
        sizes = f"{human_bytes(variant.weight_bytes)} read a token, {human_bytes(variant.kv_bytes_per_token)} of KV a token"
        lines.append(
            f"  {variant.graph}  {variant.groups} KV heads, {variant.pattern}, {variant.cache}, {variant.dtype}: {sizes}"
        )
    finish(as_json, {"out": str(out), **bundle.to_json()}, lines)
