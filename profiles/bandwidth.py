"""How fast this machine reads memory, and the floor that sets under a decode step.

A decode step of a batch reads every weight once and every key and value of the context once; no implementation that keeps
them in memory can be faster than those bytes over the read bandwidth. The floor takes the best bandwidth seen in the run
and so errs towards a larger ratio. A model smaller than the last-level cache may stay in it and get below the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import psutil

from exporter.engines.cores import physical_cores
from exporter.errors import UserError
from profiles.machine import l3_bytes
from profiles.results import Bandwidth, Cell

GIB = 1 << 30
SMALLEST = 64 << 20


class BandwidthProbe:
    """Reads one array with `threads` threads (default: one a physical core), each its own part, whenever it is called.

    The array has twice the bytes of the last-level cache and at least 1 GiB, so that it cannot stay in the cache, but no
    more than a quarter of the free memory. `array_bytes` overrides that (and tests do). Keep the probe to one run: it holds
    the array. Raises UserError when there is no memory for a useful array.
    """

    def __init__(self, threads: int | None = None, array_bytes: int | None = None, repeats: int = 3) -> None:
        self.threads = threads or physical_cores()
        self.repeats = repeats
        self.samples: list[float] = []
        wanted = array_bytes or min(max(GIB, 2 * l3_bytes()), psutil.virtual_memory().available // 4)
        if wanted < SMALLEST and not array_bytes:
            raise UserError(f"{wanted / 1e6:.0f} MB is all a bandwidth measurement may take of the free memory; free some")
        self._parts = np.array_split(np.ones(wanted // 8), self.threads)  # ones: zeros would be one shared page
        self.array_bytes = sum(part.nbytes for part in self._parts)

    def __call__(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Bytes a second, best of `repeats`; every one of them is kept in `samples`."""
        taken = []
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in range(self.repeats):
                start = clock()
                read(pool, self._parts)
                taken.append(self.array_bytes / (clock() - start))
        self.samples += taken
        return max(taken)

    def result(self) -> Bandwidth:
        return Bandwidth(self.threads, self.array_bytes, tuple(self.samples))


def read(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> None:
    """Read every byte of `parts`, of floats, once, each in a thread of `pool`; NumPy lets go of the interpreter lock meanwhile.

    Measured on an Intel Xeon, GB/s in two threads: the maximum of float64 31.5, the sum of int64 26, that of float32 12.
    """
    list(pool.map(partial(np.maximum.reduce, initial=0), parts))


def floor_seconds(cell: Cell, bytes_per_second: float) -> float | None:
    """`memory_floor` at the bandwidth of this machine's memory; None on a device that does not read it."""
    return memory_floor(cell, bytes_per_second) if cell.provider.lower().startswith("cpu") else None


def memory_floor(cell: Cell, bytes_per_second: float) -> float | None:
    """The least time one decode step can take: (weights + KV bytes of the context) / bandwidth of the memory they lie in.

    None for prefill and ttft, which arithmetic bounds and not memory.
    """
    return (cell.subject.weight_bytes + cell.kv_bytes) / bytes_per_second or None if cell.kind == "decode" else None
