"""What the command line says of itself: help, versions, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

from exporter.cli import COMMANDS, HELP, app, options


def test_constants_are_those_of_the_modules_that_define_them() -> None:
    from exporter.config import CACHE_FORMS, DTYPES, FFN_KINDS
    from exporter.convert import GROUPINGS, METHODS
    from exporter.engines import BACKENDS
    from exporter.layout import STORAGES
    from graphs.caches import CACHES
    from graphs.patterns import PATTERNS
    from profiles.results import KINDS

    assert options.METHODS == METHODS
    assert options.GROUPINGS == GROUPINGS
    assert tuple(PATTERNS) == options.PATTERNS
    assert options.CACHES == CACHE_FORMS
    assert options.DTYPES == DTYPES
    assert options.CACHE_DTYPES == CACHES
    assert tuple(BACKENDS) == options.BACKENDS
    assert FFN_KINDS == options.FFN_KINDS
    storage = next(p for p in app.get_command(None, "export").params if p.name == "storage")  # type: ignore[arg-type, union-attr]
    assert storage.type.choices == STORAGES  # type: ignore[attr-defined]
    from exporter.cli import measure

    assert measure.KINDS == KINDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, headpool) -> None:
    code, out, err = headpool(command, "--help")
    assert (code, err) == (0, "")
    assert "Examples:\n" in out
    assert f"headpool {command}" in out
    parameters = app.get_command(None, command).params  # type: ignore[arg-type, union-attr]
    assert all(
        parameter.help for parameter in parameters if isinstance(parameter, click.Option) and parameter.name != "help"
    ) or (command in ("run", "report"))


def test_help_and_version(headpool) -> None:
    code, out, _ = headpool("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in HELP)
    assert set(HELP) == set(COMMANDS)
    assert headpool()[0] == 0
    assert headpool("--version")[1].startswith("headpool")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, headpool) -> None:
    code, out, _ = headpool("completion", shell)
    assert code == 0
    assert "_HEADPOOL_COMPLETE" in out


def test_completion_completes() -> None:
    environment = {**os.environ, "_HEADPOOL_COMPLETE": "bash_complete", "COMP_WORDS": "headpool ex", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "exporter"], env=environment, capture_output=True, text=True, check=False)
    assert "plain,export" in done.stdout
