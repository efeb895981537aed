"""How fast a GPU reads its memory: the floor under a decode step there, as profiles/bandwidth.py has it for the CPU."""

from __future__ import annotations

import torch

from profiles.results import Bandwidth

GIB = 1 << 30


class DeviceProbe:
    """Reads `array_bytes` in a sum, and moves half of them from one half to the other; every sample is kept.

    The array is far larger than any GPU's cache (an H200's has 60 MB). Times are of device events, so launches do not count.
    """

    def __init__(self, array_bytes: int = 4 * GIB, repeats: int = 5) -> None:
        self.repeats, self.samples = repeats, list[float]()
        self._array = torch.ones(array_bytes // 4, dtype=torch.float32, device="cuda")

    def __call__(self) -> float:
        """Bytes a second, the best of all that were measured now."""
        first, second = self._array.chunk(2)
        taken = []
        for _ in range(self.repeats):
            for work in (self._array.sum, lambda: second.copy_(first)):  # a copy reads and writes half: as many bytes
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                stop.record()
                stop.synchronize()
                taken.append(self._array.nbytes / (start.elapsed_time(stop) / 1e3))
        self.samples += taken[2:]  # the first pair loads the kernels
        return max(taken)

    def result(self) -> Bandwidth:
        return Bandwidth(0, self._array.nbytes, tuple(self.samples))
