"""One `headpool` command in a process of its own: its time, its memory, what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

import psutil

SAMPLED_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class Cost:
    """Seconds of the whole command, its peak resident bytes, those of them that no file backs, and its stdout.

    Pages of files that are only read can be dropped whenever memory is short; what is left is what the command needs. The
    kernel keeps no peak of it: it is sampled.
    """

    seconds: float
    peak_bytes: int
    own_bytes: int
    output: str


def headpool(*arguments: str) -> Cost:
    """Raises CalledProcessError where the command fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "exporter", *arguments], stdout=output)
        own = _Sampler(process.pid)
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone; resource.getrusage knows only the largest so far
        seconds = time.perf_counter() - start
        own.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        output.seek(0)
        return Cost(seconds, usage.ru_maxrss * 1024, own.peak, output.read())


class _Sampler(threading.Thread):
    """Reads a process's memory until it is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak = psutil.Process(pid), 0
        self.start()

    def run(self) -> None:
        try:
            while (memory := self.process.memory_info()).rss:  # a zombie has none
                self.peak = max(self.peak, memory.rss - memory.shared)
                time.sleep(SAMPLED_EVERY)
        except psutil.Error:
            pass
