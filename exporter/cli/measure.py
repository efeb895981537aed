"""`headpool profile`, `sweep`, `compare` and `report`: what needs the `profiles` room, imported when a command runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.console import finish, progress_bar, table_console
from exporter.cli.select import short, with_plan

KINDS = ("decode", "prefill", "ttft")


def once(ctx: click.Context, param: click.Parameter, value: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list without its repeats: the same cell measured twice could not be told apart."""
    return tuple(dict.fromkeys(value))


measuring = options.all_of(
    click.option(
        "--contexts", type=options.IntList(), callback=once, default="128,1024", show_default=True, help="Tokens in the cache."
    ),
    click.option(
        "--batch", "batches", type=options.IntList(), callback=once, default="1", show_default=True, help="Sequences at once."
    ),
    click.option(
        "--kinds",
        type=options.ChoiceList(KINDS),
        callback=once,
        default=",".join(KINDS),
        show_default=True,
        help="What to time.",
    ),
    click.option("--samples", type=click.IntRange(min=1), default=104, show_default=True, help="Steps a cell; 100 give a p99."),
    click.option("--prefill-samples", type=click.IntRange(min=1), default=6, show_default=True, help="Prefills a cell."),
    click.option("--seconds", type=float, help="Bound on each cell's share of the sampling time."),
    click.option("--breakdown", type=options.IntList(), default=(), help="Contexts at which to show where the time goes."),
)


@click.command("profile")
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), default="latency.json", show_default=True, help="Results file.")
@click.option("--variants", help="Which graphs, by name, separated by commas.  [default: all]")
@options.all_of(measuring, options.engines, options.seed, options.as_json)
def profile_command(bundles: tuple[Path, ...], out: Path, variants: str | None, as_json: bool, **given: Any) -> None:
    """Per-token latency, prefill and time to first token of every graph of BUNDLES, interleaved in one run.

    \b
    Examples:
      headpool profile bundle --contexts 128,1024,4096
      headpool profile mha gqa8 --out both.json --batch 1,4 --kinds decode
    """
    from exporter.files import check_output
    from profiles.bundles import choose, profile_bundle
    from profiles.measure import Plan

    plan, names = options.build(Plan, given), variants.split(",") if variants else None
    choose(bundles, names, plan, given["breakdown"])  # a mistake in the inputs is said before one in the output
    for bundle in bundles:
        check_output(out, bundle)
    with progress_bar() as progress:
        results = profile_bundle(
            bundles,
            plan,
            variants=names,
            backend=given["backend"],
            threads=given["threads"],
            engine_weights=given["engine_weights"],
            breakdown=given["breakdown"],
            progress=lambda done, total, what: progress("measuring latency", done, total),
        )
    results.save(out)
    _show(results, as_json, {"out": str(out)})


@click.command("sweep")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@options.making
@click.option(
    "--ffn",
    type=options.ChoiceList(options.FFN_KINDS),
    callback=once,
    default=(),
    help="Of a config.json: these FFNs in turn, with equal parameters.",
)
@click.option("--quality-tokens", type=click.IntRange(min=0), default=2048, show_default=True, help="Tokens of text; 0: none.")
@options.all_of(measuring, options.running, options.seed, options.as_json)
def sweep_command(checkpoint: Path, out: Path, as_json: bool, **given: Any) -> None:
    """Convert CHECKPOINT (or a config.json) to each KV-head count, export, measure, and report: OUT/report.html.

    With --ffn, a config.json is measured with each of the FFNs, as many parameters in all: a gated FFN has three matrices
    instead of two, and two thirds of the width.

    Without --groups, every count that divides the query heads; with --plan, the counts that --groups names (else the
    checkpoint's own) and the plan.

    \b
    Examples:
      headpool sweep model.gguf out --groups 9,3,1 --patterns grouped,gqa,repeat --contexts 128,1024,4096
      headpool sweep config.json out --groups 16,4,1 --dtype fp16 --breakdown 1024
      headpool sweep config.json out --groups 8 --ffn relu,gelu,geglu,swiglu --patterns fused
    """
    from exporter.bundle import bundles_in
    from exporter.checkpoint import open_source
    from exporter.config import group_counts
    from exporter.export import ExportOptions
    from exporter.files import check_output
    from profiles.ffn import ffn_family, ffn_line
    from profiles.measure import Plan
    from profiles.sweep import SweepOptions, sweep

    source = open_source(checkpoint, given["seed"])
    models = ffn_family(source, given["ffn"], given["seed"])
    if (plan := given.pop("plan")) is not None:
        given = with_plan(plan, source, {**given, "groups": given["groups"] or (short(source.config.kv_heads),)})
    given["groups"] = given["groups"] or tuple(group_counts(source.config.num_heads))
    stages = {"export": options.build(ExportOptions, given), "plan": options.build(Plan, given)}
    check_output(out, checkpoint)
    with progress_bar() as progress:
        results = sweep(source, out, options.build(SweepOptions, {**given, **stages}), progress, models)
    bundles = [str(path) for path in bundles_in(out)]  # one for each FFN
    files: dict[str, Any] = {
        "out": str(out),
        **({"bundles": bundles} if given["ffn"] else {"bundle": bundles[0]}),
        "report": str(out / "report.html"),
        "results": str(out / "results.json"),
    }
    _show(results, as_json, files, [ffn_line(model) for model in models])


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--fail-above", type=float, help="Exit with 1 when any cell of B is surely slower than this times A's.")
@options.as_json
@click.pass_context
def compare_command(ctx: click.Context, a: Path, b: Path, fail_above: float | None, as_json: bool) -> int:
    """Two results files, cell by cell: the ratio B/A of medians with its 95 % bootstrap interval.

    \b
    Examples:
      headpool compare before.json after.json
      headpool compare before.json after.json --fail-above 1.05
    """
    from profiles.compare import compare, comparison_view
    from profiles.results import Results

    comparison = compare(Results.load(a), Results.load(b))
    failures = comparison.failures(fail_above) if fail_above is not None else []
    for warning in comparison.warnings:
        click.echo(f"headpool: {warning}", err=True)
    if as_json:
        pairs = [
            {
                **_named(pair.a),
                "b": {name: _named(pair.b)[name] for name in ("model", "bundle", "variant", "backend")},  # may differ
                "ratio": pair.ratio,
                "low": pair.low,
                "high": pair.high if math.isfinite(pair.high) else None,
                "failed": pair in failures,
            }
            for pair in comparison.pairs
        ]
        warnings = [*comparison.busy, *comparison.warnings]
        data = {"pairs": pairs, "only_a": comparison.only_a, "only_b": comparison.only_b, "warnings": warnings}
        finish(True, data, [])
    else:
        table_console().print(comparison_view(comparison, fail_above))
    return 1 if failures else 0


@click.command("report")
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), default="report.html", show_default=True)
@options.as_json
def report_command(results: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """One self-contained HTML page from RESULTS (files of profile or sweep). It opens offline.

    \b
    Examples:
      headpool report latency.json
      headpool report cpu.json gpu.json --out both.html
    """
    from profiles.report import write_report
    from profiles.results import Results, refuse_twice

    refuse_twice("results", results)
    write_report([Results.load(path) for path in results], out)
    finish(as_json, {"out": str(out)}, str(out))


def _named(cell: Any) -> dict[str, Any]:
    """What tells a cell from every other one."""
    subject = cell.subject
    names = ("model", "bundle", "variant", "groups", "pattern", "cache", "dtype")
    places = {"backend": cell.backend, "kind": cell.kind, "batch": cell.batch, "context": cell.context}
    return {name: getattr(subject, name) for name in names} | places


def _lines(files: dict[str, Any]) -> list[str]:
    return [f"{name}: {', '.join(path) if isinstance(path, list) else path}" for name, path in files.items()]


def _show(results: Any, as_json: bool, files: dict[str, Any], ffns: Sequence[dict[str, Any]] = ()) -> None:
    """The table for a person, with the files' names and the FFNs under it; with --json the medians, since the file holds the
    samples."""
    from profiles.noise import busy
    from profiles.stats import summary
    from profiles.table import results_view

    if not as_json:
        table_console().print(results_view(results))
        finish(False, {}, [*_lines(files), *(ffn["text"] for ffn in ffns)])
        return
    shown = ("p50", "p90", "p99", "max")  # p99 from 100 samples on
    cells = [
        {
            **_named(cell),
            "samples": len(cell.samples),
            **{f"{name}_seconds": value for name, value in vars(summary(cell.samples)).items() if name in shown and value},
            "floor_seconds": cell.floor,
            "kv_bytes_per_token": cell.subject.kv_bytes_per_token,
        }
        for cell in results.cells
    ]
    data = {**files, **({"ffn": ffns} if ffns else {}), "warnings": [text] if (text := busy(results)) else [], "cells": cells}
    finish(True, data, [])
