"""What TensorRT's builder calls while it works: how far it is, and where the plan's bytes go."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, BinaryIO


def monitor(trt: Any, on_progress: Callable[[int], None], interrupted: list[int]) -> Any:
    """An IProgressMonitor that tells thousandths done, and ends the build once a signal stands in `interrupted`."""

    class Monitor(trt.IProgressMonitor):
        """Phases nest; a phase's share is one step of its parent."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}  # steps done, steps; the outermost first
            self.most = 0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (0, max(1, steps))

        def step_complete(self, name: str, step: int) -> bool:
            self.phases[name] = (step + 1, self.phases[name][1])
            self.tell()
            return not interrupted

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)
            self.tell()

        def tell(self) -> None:
            done, share = 0.0, 1.0
            for steps_done, steps in self.phases.values():
                done, share = done + share * min(1.0, steps_done / steps), share / steps
            self.most = max(self.most, int(1000 * min(done, 1.0)))  # phases may come again
            on_progress(self.most)

    return Monitor()


def writer(trt: Any, file: BinaryIO) -> Any:
    """An IStreamWriter into `file`: `size` bytes, their `digest` (SHA-256), and the `error` that writing them ended with."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size, self.digest = 0, hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:  # raised here it would get lost in the builder
                self.error = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    return Writer()
