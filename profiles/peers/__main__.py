"""`python -m profiles.peers OUT`: what scripts/peers runs once the environments are there."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from exporter.cli.console import progress_bar
from exporter.engines.cores import physical_cores
from exporter.errors import UserError, one_of
from exporter.files import refuse_existing, replacing
from profiles.benchmarks.decoder import CONFIG, GROUPS
from profiles.benchmarks.record import save
from profiles.peers.comparison import rows_of, slopes_of, tables
from profiles.peers.run import Comparison, Options, together
from profiles.peers.runtimes import RUNTIMES, WEIGHTS, Place

PROMISE = "no other runtime is faster than the fastest of headpool's patterns, in any place"


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    try:
        compare(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(given: argparse.Namespace) -> None:
    """Raises UserError."""
    names = given.runtimes or [runtime.name for runtime in RUNTIMES]
    for name in names:
        if name not in {runtime.name for runtime in RUNTIMES}:
            raise UserError(one_of("runtime", name, [runtime.name for runtime in RUNTIMES]))
    for weights in given.weights:
        if weights not in WEIGHTS:
            raise UserError(one_of("weights", weights, WEIGHTS))
    if given.batch < 1:
        raise UserError(f"batch {given.batch} is not a whole number from 1")
    if not given.out.is_dir():
        refuse_existing(given.out)
        given.out.mkdir()
    place = Place(given.out.resolve(), given.threads or physical_cores())
    options = Options(
        given.config,
        given.groups,
        given.weights,
        given.batch,
        given.contexts,
        given.samples,
        given.prefill,
        given.prefill_samples,
    )
    with progress_bar() as progress:
        comparison = Comparison(
            [runtime for runtime in RUNTIMES if runtime.name in names],
            place,
            options,
            lambda text: print(text, file=sys.stderr, flush=True),
            lambda done, total, what: progress("measuring latency", done, total),
        )
        comparison.prepare()
        parts = [] if given.prepare else comparison.measure()
    if not parts:
        return
    results = together(parts)
    rows, missing = rows_of(results), [dataclasses.asdict(each) for each in comparison.missing]
    differences = comparison.agreement.rows.rows
    for name in ("latency.json", "peers.json"):
        (given.out / name).unlink(missing_ok=True)
    results.save(given.out / "latency.json")
    kept = not missing and all(row.get("to_headpool", 1) >= 1 for row in rows if "headpool" not in row["runtime"])
    beside = {"slope": slopes_of(rows), "logits": differences, "left out": missing}
    every = rows + [{"what": what, **row} for what, part in beside.items() for row in part]
    save(given.out / "peers.json", "peers", PROMISE, every, kept, run=results, config=given.config.name)
    text = tables(rows, differences, missing)
    with replacing(given.out / "peers.md") as file:
        file.write_text(text, "utf-8")
    print(text)


def _parser() -> argparse.ArgumentParser:
    numbers = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser("scripts/peers", description=__doc__)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder for models, parts and results; a run that was stopped goes on"
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json of a Llama (default: %(default)s)")
    parser.add_argument("--groups", type=numbers, default=GROUPS, help="KV heads, for example 16,4,1")
    parser.add_argument("--batch", type=int, default=1, help="sequences in step, of one length (default: 1)")
    parser.add_argument("--contexts", type=numbers, default=(512, 4096), help="tokens of context of a decode step")
    parser.add_argument("--weights", type=lambda text: tuple(text.split(",")), default=WEIGHTS, help="fp32,int4 or one of them")
    parser.add_argument("--samples", type=int, default=48, help="decode steps timed a runtime and place (default: 48)")
    parser.add_argument(
        "--prefill", type=int, default=2048, help="tokens of the prompt of a first token (default: 2048); 0: none"
    )
    parser.add_argument("--prefill-samples", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--threads", type=int, help="of every runtime; default: one a physical core")
    parser.add_argument("--runtimes", type=lambda text: text.split(","), help="; ".join(r.name for r in RUNTIMES))
    parser.add_argument("--prepare", action="store_true", help="export and check only, measure nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
