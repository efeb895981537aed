"""Where the suite's steps keep what they make, and how results get there as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from exporter.files import replacing
from profiles.bandwidth import memory_floor
from profiles.machine import fingerprint, versions
from profiles.results import Bandwidth, Cell, Results


@dataclass(frozen=True)
class Place:
    """`out` is for results, `work` for bundles; `device` cuda or cpu; `shapes` full or tiny."""

    out: Path
    work: Path
    device: str = "cuda"
    shapes: str = "full"

    @property
    def dtype(self) -> str:
        return "fp16" if self.device == "cuda" else "fp32"

    def bundle(self, model: str) -> Path:
        return self.work / model

    def results(self, model: str, backend: str) -> Path:
        """One file for each model and backend, so that `headpool compare` finds a cell once in a file."""
        return self.out / f"{model}-{backend}.json"

    def add(self, model: str, backend: str, cells: Iterable[Cell], bandwidth: Bandwidth) -> Results:
        """Put cells to those of earlier steps, in one write. Every floor is taken at the best bandwidth of the file."""
        path, new = self.results(model, backend), tuple(cells)
        if path.is_file():
            old = Results.load(path)
            known = tuple(old.bandwidth.samples) if old.bandwidth else ()
            first = 1 + max((cell.cohort for cell in old.cells), default=-1)
        else:
            settings = {"suite": "gpu", "model": model, "backend": backend, "device": self.device, "shapes": self.shapes}
            old = Results(datetime.now(UTC).isoformat(timespec="seconds"), fingerprint(), versions(), settings, ())
            known, first = (), 0
        bandwidth = dataclasses.replace(bandwidth, samples=known + bandwidth.samples)
        cells = (*old.cells, *(dataclasses.replace(cell, cohort=first + cell.cohort) for cell in new))
        floored = tuple(dataclasses.replace(cell, floor=memory_floor(cell, bandwidth.best)) for cell in cells)
        results = dataclasses.replace(old, cells=floored, bandwidth=bandwidth)
        with replacing(path) as temporary:
            results.save(temporary)
        return results

    def by_model(self) -> dict[str, list[Results]]:
        """The results on disk, those of one model together."""
        found: dict[str, list[Results]] = {}
        for path in sorted(self.out.glob("*-*.json")):
            found.setdefault(path.name.partition("-")[0], []).append(Results.load(path))
        return found
