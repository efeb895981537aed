"""A read of as many bytes as a decode step reads, which takes turns with the steps: the floor at the same moments.

On a machine that shares its memory with others the best bandwidth of a run says what a lucky moment allows, and the median
step is of a typical one. What is measured in turns with the steps has had the same moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from exporter.config import ModelConfig
from exporter.engines.base import Session, SessionInfo
from exporter.engines.cores import physical_cores
from exporter.engines.huge_pages import zeros
from exporter.errors import UserError
from profiles import stats
from profiles.bandwidth import read
from profiles.measure import OpenSession
from profiles.results import Cell, Subject

READ = "read"  # the pattern and the backend of such cells


class Reading(Session):
    """A session whose step is a read of a model's weights' and cache's bytes, by NumPy in one thread a core.

    They lie on huge pages, as those of headpool's sessions do. Logits are zeros.
    """

    def __init__(self, config: ModelConfig, subject: Subject, batch: int, capacity: int, threads: int | None) -> None:
        self.threads = threads or physical_cores()
        options = {"threads": self.threads}
        super().__init__(config, batch, capacity, SessionInfo(READ, "CPU", {"numpy": np.__version__}, options))
        self._subject = subject
        self._array = zeros(((subject.weight_bytes + batch * capacity * subject.kv_bytes_per_token) // 8,), np.float64)
        self._array[:] = 1  # memory that nobody wrote is one page of zeros, read many times
        self._pool = ThreadPoolExecutor(self.threads)
        self._logits = np.zeros((batch, config.vocab_size), np.float32)

    def prefill(self, prompts: list[np.ndarray]) -> np.ndarray:
        self.lengths += [len(prompt) for prompt in prompts]
        return self._logits

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        used = (self._subject.weight_bytes + self.kv_bytes()) // 8
        read(self._pool, np.array_split(self._array[:used], self.threads))
        self.lengths += 1
        return self._logits

    def rewind(self, length: int) -> None:
        self.lengths[:] = length

    def close(self) -> None:
        self._pool.shutdown()
        self._array = self._array[:0]

    def _kv_token_bytes(self) -> int:
        return self._subject.kv_bytes_per_token


def beside(subject: Subject, config: ModelConfig, threads: int | None = None) -> tuple[Subject, OpenSession]:
    """What `measure` takes for the read of `subject`'s bytes, to have its turns beside `subject` itself."""

    def open_session(*, batch: int, capacity: int, profile_to: Path | None = None) -> Reading:
        return Reading(config, subject, batch, capacity, threads)

    return dataclasses.replace(subject, pattern=READ, variant=f"{subject.variant}.{READ}"), open_session


def by_reads(cells: Iterable[Cell]) -> list[Cell]:
    """The cells without the reads, the floor of each decode step the median read of its bytes; as they are where none was read.

    Raises UserError for a step that no read took turns with, when others had theirs: the two floors are not comparable.
    """
    every = list(cells)
    reads = {_place(cell): cell for cell in every if cell.backend == READ}
    return [_floored(cell, reads) if reads and cell.kind == "decode" else cell for cell in every if cell.backend != READ]


def _floored(cell: Cell, reads: Mapping[tuple[object, ...], Cell]) -> Cell:
    if not (same := reads.get(_place(cell))):
        raise UserError(
            f"no read took turns with {cell.subject.pattern} at {cell.context} tokens of context: there is too little memory "
            "for all of them at once; measure fewer patterns or groups"
        )
    return dataclasses.replace(cell, floor=stats.median(same.samples))


def _place(cell: Cell) -> tuple[object, ...]:
    return cell.kind, cell.subject.groups, cell.batch, cell.context, cell.cohort
