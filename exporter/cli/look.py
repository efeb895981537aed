"""`headpool doctor`, `headpool inspect`, `headpool completion`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import options
from exporter.cli.console import finish


@click.command("doctor")
@options.as_json
def doctor_command(as_json: bool) -> None:
    """What this machine can build and run, and why not the rest.

    \b
    Examples:
      headpool doctor
      headpool doctor --json
    """
    from exporter.doctor import diagnose, render

    report = diagnose()
    finish(as_json, report, render(report))


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@options.as_json
def inspect_command(path: Path, as_json: bool) -> None:
    """Architecture, parameters, KV bytes a token, FFN kind and KV heads per layer of a checkpoint, config or bundle.

    \b
    Examples:
      headpool inspect llama/
      headpool inspect model.gguf --json
      headpool inspect bundle
    """
    from exporter.inspection import inspect, render

    report = inspect(path)
    finish(as_json, report, render(report))


@click.command("completion")
@click.argument("shell", type=options.OneOf(("bash", "zsh", "fish")), metavar="SHELL")
def completion_command(shell: str) -> None:
    """Print the completion script of SHELL: bash, zsh or fish.

    \b
    Examples:
      eval "$(headpool completion bash)"
      headpool completion fish > ~/.config/fish/completions/headpool.fish
    """
    from click.shell_completion import get_completion_class

    from exporter.cli import app

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    click.echo(completion_class(app, {}, "headpool", "_HEADPOOL_COMPLETE").source())
