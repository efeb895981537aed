"""Running the tools that build C++, and what to do where they are missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).parents[2]


def lacking(what: str) -> NoReturn:
    """Skips the test, the reason in one line; in CI it fails."""
    # A machine without a compiler can use all of headpool but the C++ runtime: there only these tests have nothing to test.
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the C++ tests need {what}")
    raise AssertionError


def run(*command: object, **environment: str) -> str:
    """What it printed. A command that fails fails the test, with all of that."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
