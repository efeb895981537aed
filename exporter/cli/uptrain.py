"""`headpool uptrain`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.console import finish, progress_bar


@click.command("uptrain")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|hf:NAME",
    help="Text, .jsonl, .parquet or .csv, or hf:NAME[:CONFIG[:SPLIT]] of the datasets package; repeat for more.",
)
@click.option("--field", default="text", show_default=True, help="Of JSONL lines and dataset rows that holds the text.")
@click.option("--steps", type=click.IntRange(min=1), help="How long, in optimizer steps.")
@click.option("--alpha", type=float, help="How long, as a share of --original-tokens; the paper's is 0.05.")
@click.option("--original-tokens", type=float, metavar="N", help="Tokens of the original pre-training, such as 2e12.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Windows a step, over all processes.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Windows at once in a process.  [default: all it has]")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens a window.")
@click.option(
    "--optimizer",
    type=options.OneOf(("adamw", "adafactor")),
    default="adamw",
    show_default=True,
    help="AdamW, or Adafactor: less memory.",
)
@click.option("--lr", type=float, help="Peak rate; a cosine leads to a tenth of it.  [default: 1e-4, adafactor 1e-3]")
@click.option("--warmup", type=float, default=0.02, show_default=True, help="Share of the steps that lead up to the peak.")
@click.option("--train", type=options.OneOf(("all", "attention")), default="all", show_default=True, help="Which weights.")
@click.option(
    "--dtype", type=options.OneOf(("fp32", "bf16")), help="Of matrix products.  [default: bf16 where there is hardware]"
)
@click.option("--checkpointing", is_flag=True, help="Compute activations again in the backward pass: less memory, more time.")
@click.option("--teacher", type=click.Path(), help="Distil from this checkpoint, the one from before the conversion.")
@click.option("--kl", type=float, default=1.0, show_default=True, help="Weight of the KL divergence from the teacher.")
@click.option("--hidden", type=float, default=1.0, show_default=True, help="Weight of the distance of its hidden states.")
@click.option("--held-out", type=click.IntRange(min=1), default=8, show_default=True, help="First windows, never trained on.")
@click.option("--save-every", type=click.IntRange(min=1), default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--device", type=options.OneOf(("cpu", "cuda")), help="[default: cuda where there is one]")
@options.all_of(options.seed, options.as_json)
def uptrain_command(checkpoint: Path, out: Path, as_json: bool, **given: Any) -> None:
    """Train CHECKPOINT (what convert wrote; or a config.json, from scratch) a little more, and write it to OUT.

    Until OUT is there, the run keeps tokens, figures and checkpoints in OUT.run: after Ctrl-C or a crash the same command goes
    on from the last one. OUT is a Hugging Face checkpoint with metrics.jsonl and TensorBoard's runs/. Start it with
    torchrun to share the work between GPUs, or machines that see the same folder.

    \b
    Examples:
      headpool uptrain llama-gqa8 llama-gqa8-up --data text.jsonl --alpha 0.05 --original-tokens 2e9
      headpool uptrain llama-gqa8 up --data hf:Salesforce/wikitext:wikitext-2-raw-v1 --steps 500 --teacher llama/
      torchrun --nproc-per-node 8 --no-python headpool uptrain llama-gqa8 up --data text.jsonl --steps 500
    """
    import dataclasses

    from exporter.uptrain import UptrainOptions, uptrain
    from exporter.uptrain.run_folder import run_folder

    chosen = options.build(UptrainOptions, given)
    try:
        with progress_bar() as progress:
            done = uptrain(checkpoint, out, chosen, progress)
    except KeyboardInterrupt:
        if not run_folder(out).exists():
            raise
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"headpool: interrupted; the same command goes on from {run_folder(out)}", err=True)
        click.get_current_context().exit(130)
    if done is None:
        return  # the first process speaks for all
    passes = f"{done.passes:.2g}"
    plural = "es" * (passes != "1")
    lines = [
        f"{out}: {done.steps} step{'s' * (done.steps != 1)}, {done.tokens:,} tokens, {passes} pass{plural} over the data, "
        f"{done.seconds:,.{0 if done.seconds >= 10 else 1}f} s in {done.dtype}",
        f"held-out cross-entropy {done.before:.4f} → {done.after:.4f} nats a token",
    ]
    finish(as_json, {"out": str(out), **dataclasses.asdict(done)}, lines)
