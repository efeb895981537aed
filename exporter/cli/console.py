"""What every command prints with: a progress bar on stderr, the result on stdout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import click

Progress = Callable[[str, int, int], None]
WIDTH = 110  # characters that a table takes


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback (what, done, total) that draws one bar for each kind of work, on stderr and only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def table_console() -> Any:
    """Rich's console on stdout, as wide as the widest table where no terminal says how wide it is."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    return console


def finish(as_json: bool, data: dict[str, Any], lines: str | list[str]) -> None:
    """Print the result for a person, or as one JSON line."""
    if as_json:
        click.echo(json.dumps(data, ensure_ascii=False))
    else:
        click.echo(lines if isinstance(lines, str) else "\n".join(lines))
