"""The command line: parse, call, print. Nothing heavy is imported before a command runs.

A user's mistake ends in one line on stderr and exit code 2. Results go to stdout, progress to stderr; with --json the last
line of stdout is one JSON object. Ctrl-C ends with exit code 130 and leaves no half-written output.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from typing import Any

import click

from exporter.cli.mistakes import words
from exporter.errors import UserError, one_of

# command → module of this folder that holds it as a click command of that name
COMMANDS = {
    "doctor": "look",
    "inspect": "look",
    "convert": "make",
    "select": "select",
    "uptrain": "uptrain",
    "export": "make",
    "build": "build",
    "run": "use",
    "eval": "use",
    "profile": "measure",
    "sweep": "measure",
    "compare": "measure",
    "report": "measure",
    "completion": "look",
}
HELP = {
    "doctor": "What this machine can build and run, and why not the rest.",
    "inspect": "Architecture, parameters and KV bytes of a checkpoint or bundle.",
    "convert": "A checkpoint with fewer (or more) KV heads.",
    "select": "KV heads for each layer, for a KV, latency or quality target.",
    "uptrain": "Short continued pre-training of what convert wrote.",
    "export": "A checkpoint or config becomes a bundle of ONNX graphs.",
    "build": "A bundle's graphs become TensorRT engines, with or without a GPU.",
    "run": "Generate text from a bundle, tokens streaming.",
    "eval": "Cross-entropy on a text, and agreement with a reference.",
    "profile": "Per-token latency of bundles, as JSON.",
    "sweep": "Convert, export and profile over KV-head counts, with a report.",
    "compare": "Two result files side by side, with intervals.",
    "report": "Result files as one HTML page.",
    "completion": "The shell's completion script.",
}


class ReaderGone(Exception):
    """The reader of a pipe went away. click would take a BrokenPipeError for itself, and exit with 1."""


class LazyGroup(click.Group):
    """Commands are imported when they are asked for, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"exporter.cli.{COMMANDS[cmd_name]}")
        return getattr(module, f"{cmd_name}_command")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            raise ReaderGone from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise UserError(one_of("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(HELP.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="headpool", prog_name="headpool")
def app() -> None:
    """Take a multi-head checkpoint to a grouped-query engine, and show what that bought.

    \b
    Examples:
      headpool inspect  SmolLM2-135M.gguf
      headpool sweep    SmolLM2-135M.gguf out --groups 9,3,1 --contexts 128,1024
      headpool export   llama/ bundle --groups 8 --pattern gqa --dtype fp16
      headpool run      bundle --prompt "The capital of France is"
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. SIGTERM ends it as Ctrl-C does; what a terminal cannot write becomes an escape."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        code = app.main(args=arguments, prog_name="headpool", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        first = (sys.argv[1:] if arguments is None else arguments)[:1]
        return _fail(f"{words(error)} (see '{' '.join(['headpool', *(set(first) & set(COMMANDS)), '--help'])}')")
    except UserError as error:
        return _fail(str(error))
    except ReaderGone:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  there is nobody to tell
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except MemoryError as error:
        return _fail(f"not enough memory: {error or 'an allocation failed'}; take a smaller batch, context or model")
    except UnicodeEncodeError as error:
        return _fail(f"{error.object!r:.100} is not Unicode text; give the file or folder another name")
    except (KeyboardInterrupt, click.Abort):
        click.echo("headpool: interrupted; nothing half-written was left", err=True)
        return 130


def _fail(message: str) -> int:
    click.echo("headpool: " + " ".join(message.split()), err=True)
    return 2
