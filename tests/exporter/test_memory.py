"""Freed memory really goes back, in a process of its own, and while TensorRT builds."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from exporter.engines.tensorrt import compile as compiling

FREE_BETWEEN_USED = """
import platform, sys
import numpy as np, psutil
from exporter.memory import give_memory_back

if platform.libc_ver()[0] != "glibc":
    sys.exit("another C library")
blocks = [np.ones(12_000) for _ in range(2_000)]  # 96 kB each, too small for pages of their own
kept = blocks[::200]
del blocks
resident = lambda: psutil.Process().memory_info().rss
before = resident()
give_memory_back()
print(before - resident())
"""


def test_freed_blocks_between_used_ones_go_back():
    done = subprocess.run([sys.executable, "-c", FREE_BETWEEN_USED], capture_output=True, text=True, check=False)
    if done.stderr.strip() == "another C library":
        pytest.skip("only glibc keeps them")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150_000_000  # of 192 MB


def test_a_build_gives_memory_back_while_it_runs(monkeypatch):
    gave = threading.Event()
    monkeypatch.setattr(compiling, "give_memory_back", gave.set)

    class Weights:
        released = 0

        def release(self):
            self.released += 1

    weights = Weights()
    with compiling._releasing(weights):
        assert gave.wait(30)
    assert weights.released
