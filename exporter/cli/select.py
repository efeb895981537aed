"""`headpool select`, and the option --plan of the commands that follow what it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from exporter.cli import options
from exporter.cli.console import finish, progress_bar
from exporter.errors import UserError, option

SHOWN = 12  # points of a Pareto front on a terminal


@click.command("select")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="plan.json", show_default=True, help="The plan.")
@click.option("--kv-budget", type=float, metavar="SHARE", help="At most this share of the checkpoint's own KV cache.")
@click.option("--target-ms", type=float, metavar="MS", help="At most so many milliseconds a token at --context.")
@click.option("--max-loss", type=float, metavar="NATS", help="At most this divergence from the checkpoint, nats a token.")
@click.option(
    "--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens in the cache, for --target-ms."
)
@click.option(
    "--measurements",
    type=click.Path(path_type=Path),
    help="Where the losses of layers are kept, to go on from or to select again.  [default: OUT.measured.json]",
)
@click.option("--pattern", type=options.OneOf(options.PATTERNS), default="grouped", show_default=True, help="For --target-ms.")
@options.all_of(options.select_method, options.grouping, options.calibration, options.dtype, options.running)
@options.all_of(options.seed, options.as_json)
def select_command(checkpoint: Path, out: Path, as_json: bool, **given: Any) -> None:
    """Choose the KV heads of each layer of CHECKPOINT for a target, and write the plan that convert, export and sweep follow.

    Each layer is replaced alone by each smaller number of KV heads, and what that costs measured on calibration tokens; with
    --target-ms also what a step takes on this machine. Then the best sum of both is found exactly. What was measured stays in
    a file beside the plan: an interrupted run goes on from there, and another target needs no more measuring.

    \b
    Examples:
      headpool select llama/ --kv-budget 0.33
      headpool select llama/ --target-ms 25 --context 4096 --pattern fused --calibration text.txt
      headpool select llama/ --max-loss 0.05 --out careful.json
      headpool convert llama/ llama-planned --plan plan.json
    """
    target = _target(given)
    from exporter.checkpoint import open_checkpoint
    from exporter.convert import select
    from exporter.files import check_output

    store = given["measurements"] or out.with_name(f"{out.stem}.measured.json")
    if store.resolve() == out.resolve():
        raise UserError(f"{store} is named by --out and by --measurements; name two files")
    if out.exists() and store.is_file():
        again = f"remove it, or choose another --out, with --measurements {store} so that nothing is measured again"
        raise UserError(f"{out} exists; {again}")
    check_output(out, checkpoint)
    if not store.exists():  # else it is gone on from
        check_output(store, checkpoint)
    opened = open_checkpoint(checkpoint)
    how = options.build(select.How, given)
    ((name, value),) = target.items()
    with _kept(store), progress_bar() as progress:
        selection = select.Selection(opened, how, store, progress)
        before = sum(opened.config.kv_heads)
        costs, unit = select.kv_costs(opened.config), 1 / before
        if name == "target_ms":
            counts = sorted({count for layer in selection.counts for count in layer}, reverse=True)
            seconds = _latency(opened, tuple(counts), given, progress)
            costs, unit = select.latency_costs(opened.config, seconds), 1e3 / select.TICKS
        if name != "max_loss":
            what = "of the KV cache" if name == "kv_budget" else f"ms a token at {given['context']:,} tokens"
            select.check_reachable(costs, value / unit, unit, option(name), what)
        selection.measure()
        front = selection.front(costs)
        if name == "max_loss":
            point, loss = selection.within_loss(front, value)
        else:
            point = select.dearest(front, value / unit)
            loss = selection.loss_of(point)
        heads = selection.kv_heads_of(point)
        found = {"kv_share": sum(heads) / before, "sum_of_losses": point.loss, "loss": loss}
        if name == "target_ms":
            same = (*dict.fromkeys((opened.config.kv_heads, heads)),)
            measured = _latency(opened, tuple(short(kv_heads) for kv_heads in same), given, progress)
            found |= {"ms": point.cost * unit, "measured_ms": measured[short(heads)] * 1e3, "context": given["context"]}
            found["measured_ms_before"] = measured[short(opened.config.kv_heads)] * 1e3
    plan = selection.plan(point, target, found)
    plan.save(out)
    points = [
        {"kv_share": sum(selection.kv_heads_of(each)) / before, "sum_of_losses": each.loss, "chosen": each is point}
        | ({"ms": each.cost * unit} if name == "target_ms" else {})
        for each in front
    ]
    data = {"out": str(out), "measurements": str(store), "plan": dataclasses.asdict(plan), "front": points}
    finish(as_json, data, [*_front_lines(points), *_plan_lines(plan, out)])


def with_plan(path: Path | None, source: Any, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, options of a command, with the plan in `path` as a last number of groups, and with the plan's way to convert
    where the command line has none of its own. Raises UserError where the plan is not for `source`."""
    if path is None:
        return given
    from exporter.convert.calibration import CALIBRATIONS
    from exporter.convert.plan import KVPlan

    plan = KVPlan.load(path)
    plan.check(source.config, source.name, path)
    context = click.get_current_context()
    named = {"method": plan.method, "grouping": plan.grouping, "calibration": plan.calibration, "seed": plan.seed}
    if context.get_parameter_source("method") is not ParameterSource.DEFAULT:
        named = {}  # another method: what goes with it is the command line's too
    taken = {key: value for key, value in named.items() if context.get_parameter_source(key) is ParameterSource.DEFAULT}
    text = plan.calibration if "calibration" in taken else None
    if text and text not in CALIBRATIONS and not Path(text).is_file():
        raise UserError(f"{path} was made with the calibration text {text}, which is not there; give one with --calibration")
    if source.files and plan.kv_digest not in ("", source.kv_digest()):
        others = f"was chosen for other weights than {source.name}'s, those of {plan.model}; it is followed all the same"
        click.echo(f"headpool: {path} {others}", err=True)
    groups = tuple(group for group in given.get("groups") or () if group != short(plan.kv_heads))
    return {**given, **taken, "groups": (*groups, short(plan.kv_heads))}


def short(kv_heads: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number where all layers agree: what `groups` take."""
    return kv_heads[0] if len(set(kv_heads)) == 1 else kv_heads


@contextlib.contextmanager
def _kept(store: Path) -> Iterator[None]:
    """Ctrl-C is told what it left."""
    try:
        yield
    except KeyboardInterrupt:
        if not store.exists():
            raise
        click.echo(f"headpool: interrupted; {store} keeps what was measured, the same command goes on from there", err=True)
        click.get_current_context().exit(130)


def _target(given: dict[str, Any]) -> dict[str, float]:
    names = ("kv_budget", "target_ms", "max_loss")
    target = {name: given[name] for name in names if given[name] is not None}
    if len(target) != 1:
        choices = ", ".join(map(option, names))
        raise UserError(f"{' and '.join(map(option, target)) or 'no target'} given; give exactly one of {choices}")
    ((name, value),) = target.items()
    most = 1.0 if name == "kv_budget" else float("inf")
    if not (0 < value <= most and value < float("inf")):
        raise UserError(f"{option(name)} {value:g} is not a number above 0" + (" and at most 1" if name == "kv_budget" else ""))
    return target


def _latency(opened: Any, counts: tuple[Any, ...], given: dict[str, Any], progress: Any) -> Any:
    from profiles.kv_latency import decode_seconds

    how = {key: given[key] for key in ("context", "pattern", "dtype", "backend", "threads")}
    return decode_seconds(opened, counts, how.pop("context"), **how, progress=progress)


def _front_lines(points: list[dict[str, Any]]) -> list[str]:
    """The Pareto front, thinned out evenly around its ends and the chosen point."""
    chosen = next(index for index, point in enumerate(points) if point["chosen"])
    step = max(1, -(-len(points) // SHOWN))
    shown = sorted({*range(0, len(points), step), chosen, len(points) - 1})
    lines = ["KV cache   " + ("ms a token   " if "ms" in points[0] else "") + "sum of losses, nats a token"]
    for index in shown:
        point = points[index]
        ms = f"{point['ms']:>10.3g}   " if "ms" in point else ""
        lines.append(f"{point['kv_share']:>8.1%}   {ms}{point['sum_of_losses']:.3g}{'   ← chosen' * point['chosen']}")
    if len(shown) < len(points):
        lines.append(f"({len(points)} plans are on the front)")
    return lines


def _plan_lines(plan: Any, out: Path) -> list[str]:
    found = plan.found
    lines = [f"KV heads by layer: {' '.join(map(str, plan.kv_heads))}"]
    over = found.get("measured_ms", 0.0) > plan.target.get("target_ms", float("inf"))
    lines.append(f"measured as a whole: {found['loss']:.3g} nats a token from the original, by {plan.method}")
    if "measured_ms" in found:
        lines.append(
            f"a step takes {found['measured_ms']:.3g} ms at {found['context']:,.0f} tokens, "
            f"before {found['measured_ms_before']:.3g} ms"
            + f": more than the {plan.target['target_ms']:g} ms asked for, as layers do not add up exactly; ask for less"
            * over
        )
    return [*lines, str(out)]
