"""How fast this machine multiplies: with few KV heads that, and not memory, bounds what a further token of context costs.

Attention works out as many products whatever the number of KV heads, while the cache it reads shrinks with them, so a token
of context costs at least the larger of the two (the roofline of Williams et al. 2009).
"""

from __future__ import annotations

import time

import torch

from exporter.engines.cores import physical_cores
from profiles.results import Arithmetic

SIZE = 1024  # of square matrices: three of them lie in the caches of one core or two


class ArithmeticProbe:
    """Multiplies float32 matrices with `threads` threads (default: one a physical core), as fast as torch can."""

    def __init__(self, threads: int | None = None, repeats: int = 8) -> None:
        self.threads = threads or physical_cores()
        self.repeats = repeats
        self.samples: list[float] = []

    def __call__(self) -> None:
        """Operations a second, a multiplication and an addition being two; all are kept in `samples`."""
        x, y = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for _ in range(self.repeats):
                start = time.perf_counter()
                torch.mm(x, y)
                self.samples.append(2 * SIZE**3 / (time.perf_counter() - start))
        finally:
            torch.set_num_threads(before)

    def result(self) -> Arithmetic:
        return Arithmetic(self.threads, tuple(self.samples))
