"""`headpool run` and `headpool eval`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from exporter.cli import options
from exporter.cli.console import finish, progress_bar
from exporter.errors import UserError


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from; several make a batch.  [default: stdin]")
@click.option("--tokens", type=options.IdList(), help="Token ids instead of text.")
@click.option("--chat", is_flag=True, help="Each prompt is a question, put into the model's chat template.")
@click.option("--variant", help="Which graph of the bundle.  [default: the first]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Keep the k likeliest tokens; 0 keeps all.")
@click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens that sum to p.")
@click.option("--capacity", type=click.IntRange(min=1), help="KV cache rows a sequence.  [default: what the run needs]")
@options.all_of(options.seed, options.engines, options.as_json)
def run_command(
    bundle: Path,
    prompts: tuple[str, ...],
    tokens: tuple[int, ...] | None,
    chat: bool,
    variant: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    capacity: int | None,
    seed: int,
    backend: str,
    threads: int | None,
    engine_weights: str | None,
    as_json: bool,
) -> None:
    """Generate from BUNDLE; one prompt streams as it comes.

    \b
    Examples:
      headpool run bundle --prompt "The capital of France is" --max-new-tokens 20
      headpool run bundle --chat --prompt "Why is the sky blue?" --temperature 0.7 --top-p 0.9 --seed 1
      headpool run bundle --variant g3.gqa --tokens 504,3575,282 --json
    """
    from exporter.bundle import Bundle
    from exporter.generate import Sampler
    from exporter.serve import Generation, Prompts

    opened = Bundle.open(bundle)
    chosen = opened.variant(variant)
    if tokens and (prompts or chat):
        raise UserError("--tokens stands instead of --prompt and --chat; give one of them")
    texts = prompts or (() if tokens else (_stdin(),))
    fed = Prompts.from_ids(opened, chosen, tokens) if tokens else Prompts.from_texts(opened, chosen, list(texts), chat)
    sampler = Sampler(temperature, top_k, top_p, seed)
    generation = Generation(opened, chosen, fed, sampler, max_new_tokens, capacity, backend, threads, engine_weights)
    with generation:
        streaming = len(fed.ids) == 1 and not as_json
        for piece in generation.stream():
            if streaming:
                click.echo(piece, nl=False)
        if streaming:
            click.echo()
    lines = [f"[{row}] {text}" for row, text in enumerate(generation.texts or (), 1)]
    if as_json or not streaming:
        finish(as_json, generation.report(), lines)
    click.echo(generation.summary(), err=True)


@click.command("eval")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text file.  [default: Python's own language reference]")
@click.option("--tokens", "limit", type=click.IntRange(min=2), default=2048, show_default=True, help="How many to score.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens a window; half is context.")
@click.option("--reference", type=click.Path(path_type=Path), help="Checkpoint or bundle to compare next tokens with.")
@click.option("--variant", help="Which graph of the bundle.  [default: the first]")
@options.all_of(options.engines, options.as_json)
def eval_command(
    path: Path,
    text: Path | None,
    limit: int,
    window: int,
    reference: Path | None,
    variant: str | None,
    backend: str,
    threads: int | None,
    engine_weights: str | None,
    as_json: bool,
) -> None:
    """Cross-entropy of PATH (a bundle, run as it decodes, or a checkpoint, in torch) on a text, in nats a token.

    With --reference also the share of positions whose most likely next token is the reference's, and the mean KL divergence.

    \b
    Examples:
      headpool eval bundle
      headpool eval bundle --variant g1 --reference model.gguf --tokens 1024
      headpool eval checkpoint/ --text book.txt --json
    """
    from exporter.evaluate import agreement, check_text, cross_entropy, cut, default_text
    from exporter.serve import Model, check_scoring

    model = Model.find(path, variant)
    if model.variant is None and (backend, threads, engine_weights) != (options.BACKENDS[0], None, None):
        raise UserError(
            f"{path} is a checkpoint, which is scored in eager torch; --backend, --threads and --engine-weights are of a bundle"
        )
    compared = Model.find(reference) if reference is not None else None
    check_scoring(model, compared, window)
    ids = model.tokenizer().encode(_read(text) if text else default_text(), special=False)[:limit]
    check_text(ids)
    started = time.perf_counter()
    with model.session(window, backend, threads, engine_weights) as session, progress_bar() as progress:
        loss = cross_entropy(session, ids, window, max(1, window // 2), lambda done, n: progress("scoring", done, n))
        data = {"path": str(path), "nats_per_token": loss.nats_per_token, "tokens": loss.tokens}
        lines = [f"cross-entropy {loss.nats_per_token:.4f} nats a token over {loss.tokens} token{'s' * (loss.tokens > 1)}"]
        if compared is not None:
            with compared.session(window, backend, threads) as other:
                windows = cut(ids, window, len(ids) // window or 1)
                same = agreement(session, other, windows, lambda done, n: progress("comparing", done, n))
            data |= {"reference": str(reference), "same_token": same.same_token, "mean_kl": same.mean_kl}
            data["compared_positions"] = same.positions
            lines.append(f"same next token as {reference} at {same.same_token:.2%} of {same.positions} positions")
            lines.append(f"mean KL divergence from it {same.mean_kl:.5f} nats")
    data["seconds"] = round(time.perf_counter() - started, 2)
    finish(as_json, data, lines)


def _stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8").rstrip("\n") if sys.stdin else ""  # None where it is closed
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not UTF-8 text") from None
    if not text:
        raise UserError("standard input holds no prompt; give one there, with --prompt, or as token ids with --tokens")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a text file") from None
