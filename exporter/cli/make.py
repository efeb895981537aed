"""`headpool convert` and `headpool export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.console import finish, progress_bar
from exporter.cli.select import with_plan
from exporter.errors import UserError


class OneCount(click.IntRange):
    """One number, where other commands take several."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "," in str(value):
            self.fail(f"{value!r} is not a whole number; convert takes one count", param, ctx)
        return super().convert(value, param, ctx)


@click.command("convert")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--groups", "count", type=OneCount(min=1), help="KV heads G of every layer after.")
@click.option("--glu-values", type=click.IntRange(min=1), help="GLU attention, with values of so many channels a head.")
@options.all_of(options.plan, options.converting, options.seed, options.as_json)
def convert_command(
    checkpoint: Path,
    out: Path,
    count: int | None,
    glu_values: int | None,
    plan: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write CHECKPOINT (a Hugging Face folder or a GGUF file) to the folder OUT with G KV heads a layer.

    Fewer heads are pooled, group by group, as in the GQA paper; more heads repeat the ones there are, exactly.
    --method optimal keeps most of the model: it measures each layer on calibration tokens, which takes minutes.
    OUT is a Hugging Face checkpoint that transformers loads.

    --glu-values N adds GLU attention, V' = x1 · SiLU(x2), its gates open: a start for `headpool uptrain`. With as many channels
    as the heads have the model stays what it is; fewer make the V cache smaller and need --method optimal. No other tool loads
    such models.

    \b
    Examples:
      headpool convert llama/ llama-gqa8 --groups 8
      headpool convert model.gguf mqa --groups 1 --method first --json
      headpool convert model.gguf mqa --groups 1 --method optimal --calibration text.txt
      headpool convert llama/ llama-planned --plan plan.json
      headpool convert llama/ llama-glu --glu-values 32 --method optimal
    """
    from exporter.checkpoint import open_checkpoint
    from exporter.convert import conversion_record, convert_checkpoint
    from exporter.convert.methods import REPETITION

    if (count is None) == (plan is None) and not (glu_values and plan is None):
        raise UserError(f"{'neither' if plan is None else 'both'} of --groups and --plan given; give one of them")
    if plan is not None:
        given = with_plan(plan, open_checkpoint(checkpoint), given)
    kv_heads: Any = count if plan is None else given["groups"][0]  # None: as they are
    method, seed, grouping, calibration = (given[key] for key in ("method", "seed", "grouping", "calibration"))
    with progress_bar() as progress:
        before, after = convert_checkpoint(
            checkpoint,
            out,
            kv_heads,
            method,
            seed,
            progress,
            grouping=grouping,
            calibration=calibration,
            glu_value_dim=glu_values,
        )
    _tell_no_tokenizer(out)
    record = conversion_record(before, after, method, seed, grouping, calibration)
    data = {"out": str(out), "conversion": record, "kv_heads": list(after.kv_heads)}
    if not record:
        how = ": none changed"
    elif before.kv_heads == after.kv_heads and record["method"] == REPETITION:  # gates alone are new
        how = ""
    else:
        how = f", by {record['method']}"
        if "calibration" in record:
            groups = "the best groups" if record["grouping"] == "best" else "groups as they lie"
            how += f", {groups}, " + ("no tokens" if record["calibration"] == "none" else f"tokens: {record['calibration']}")
    heads = f"{_heads(before.kv_heads)} → {_heads(after.kv_heads)} KV heads of {after.num_heads} query heads"
    gated = f", GLU attention with values of {glu_values}" if glu_values else ""
    finish(as_json, data, f"{out}: {heads}{gated}{how}")


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@options.all_of(options.making, options.seed, options.as_json)
@click.option("--logits", type=options.OneOf(("last", "all")), default="last", show_default=True, help="Of which positions.")
def export_command(checkpoint: Path, out: Path, as_json: bool, **given: Any) -> None:
    """Export CHECKPOINT (a Hugging Face folder, a GGUF file, or a config.json for random weights) to the bundle OUT.

    One graph for each KV-head count and pattern; weights that graphs share stand once.

    \b
    Examples:
      headpool export llama/ bundle
      headpool export llama/ bundle --groups 32,8,1 --pattern grouped,gqa --dtype fp16 --weights link
      headpool export llama/ planned --plan plan.json
      headpool export llama/ for-optimum --pattern gqa --cache concat
    """
    from exporter.checkpoint import open_source
    from exporter.export import ExportOptions, export
    from exporter.files import check_output
    from exporter.inspection import bundle_report, variant_lines

    source = open_source(checkpoint, given["seed"])
    chosen = options.build(ExportOptions, with_plan(given.pop("plan"), source, given))
    check_output(out, checkpoint)
    with progress_bar() as progress:
        bundle = export(source, out, chosen, progress)
    if source.files:
        _tell_no_tokenizer(out)
    lines = [f"{out}: {len(bundle.variants)} graph{'s' * (len(bundle.variants) > 1)}"]
    for variant in bundle_report(bundle)["variants"]:
        lines += variant_lines(variant)
    finish(as_json, {"out": str(out), **bundle.to_json()}, lines)


def _heads(kv_heads: tuple[int, ...]) -> str:
    return str(kv_heads[0]) if len(set(kv_heads)) == 1 else f"{min(kv_heads)} to {max(kv_heads)}"


def _tell_no_tokenizer(out: Path) -> None:
    """Right for a model that runs on token ids, a surprise for every other."""
    if not (out / "tokenizer.json").is_file():
        click.echo(f"headpool: {out} has no tokenizer.json, as its checkpoint has none: it takes token ids only", err=True)
