"""`headpool build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.console import finish, progress_bar


class Words(click.ParamType):
    """Words separated by commas; which there are, only the runtime knows."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        words = value if isinstance(value, tuple) else tuple(word.strip() for word in str(value).split(","))
        if not all(words):
            self.fail(f"{value!r} is not a list of words such as a,b", param, ctx)
        return words


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=options.OneOf(("tensorrt-rtx", "tensorrt")),
    default="tensorrt-rtx",
    show_default=True,
    help="Which TensorRT.",
)
@click.option(
    "--target",
    "targets",
    type=Words(),
    help="Chips that one engine is to run on: sm75, sm80, sm86, sm89, sm120, sm121, or here.  "
    "[default: sm80,sm86,sm89,sm120; for tensorrt: here]",
)
@click.option("--variant", "variants", type=Words(), help="Which graphs.  [default: all of pattern attention or grouped]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences an engine runs at once.")
@click.option("--capacity", type=click.IntRange(min=1), help="KV cache rows a sequence.  [default: the context, at most 4096]")
@click.option(
    "--prefill", type=click.IntRange(min=1), help="Most tokens of one prefill call, or of an encoder's input.  [default: 512]"
)
@click.option("--quantize", type=options.OneOf(("int8", "int4", "fp8")), help="Weights of the linear layers.")
@click.option("--optimisation", type=click.IntRange(0, 5), help="How hard the builder tries.  [default: the builder's own]")
@click.option("--workspace", type=click.IntRange(min=1), help="Most scratch memory of a kernel, MiB.")
@click.option("--strip", is_flag=True, help="Plans without weights; a session takes the bundle's. Needs a GPU.")
@click.option(
    "--compatible",
    type=options.ChoiceList(("version", "hardware")),
    default=(),
    help="tensorrt only: plans that later versions or other chips (Ampere and later) can run.",
)
@options.as_json
def build_command(bundle: Path, as_json: bool, **given: Any) -> None:
    """Compile TensorRT engines from the graphs of BUNDLE that keep a static cache, verified, into BUNDLE/engines.

    tensorrt-rtx needs no GPU for it. What is there already and unchanged is kept. An encoder-decoder gets two
    engines a variant.

    \b
    Examples:
      headpool build bundle --target sm86,sm89,sm120
      headpool build bundle --variant g3 --capacity 8192 --batch 4 --quantize int4
      headpool build bundle --backend tensorrt
    """
    import dataclasses

    from exporter.bundle import Bundle
    from exporter.engines.tensorrt.build import build
    from exporter.engines.tensorrt.plan import BuildOptions
    from exporter.units import size

    chosen = options.build(BuildOptions, given)
    with progress_bar() as progress:
        built = build(Bundle.open(bundle), chosen, progress)
    lines, engines = [f"{built[0].folder}: {len(built)} engine{'s' * (len(built) > 1)}"], []
    for item in built:
        how = f"built in {item.record.seconds:.1f} s" if item.fresh else "unchanged"
        lines.append(f"  {item.record.file}  {size(item.record.bytes)}, {how}")
        engines.append({"folder": str(item.folder), "fresh": item.fresh, **dataclasses.asdict(item.record)})
    finish(as_json, {"bundle": str(bundle), "engines": engines}, lines)
