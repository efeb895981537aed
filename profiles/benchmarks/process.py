"""One `headpool` command in a process of its own: its time, its memory, what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds of the whole command, its peak resident bytes, and its stdout."""

    seconds: float
    peak_bytes: int
    output: str


def headpool(*arguments: str) -> Cost:
    """Raises CalledProcessError where the command fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "exporter", *arguments], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone; resource.getrusage knows only the largest so far
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        output.seek(0)
        return Cost(seconds, usage.ru_maxrss * 1024, output.read())
