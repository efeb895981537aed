"""What a measurement is on disk: frozen dataclasses, JSON out, and a strict way back in.

Times are seconds, sizes bytes, bandwidths bytes a second. Every raw sample is kept; percentiles, intervals and ratios are
derived when they are shown (stats.py) and never stored, so a file cannot contradict itself.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.decode import decode, parse
from exporter.errors import UserError, one_of
from exporter.files import write_text

SCHEMA = 1
KIND_NAMES = {"decode": "Decode step", "prefill": "Prefill", "ttft": "Time to first token"}
KINDS = tuple(KIND_NAMES)
BREAKDOWN_CLASSES = ("attention", "matmul", "other", "runtime")


@dataclass(frozen=True)
class Subject:
    """One graph that was measured: all of a bundle's variant that a figure has to name."""

    model: str  # the checkpoint the bundle was made from
    bundle: str  # name of the bundle's folder
    bundle_hash: str  # sha256 over its manifest and graph (see bundles.bundle_hash)
    variant: str
    groups: int | tuple[int, ...]  # KV heads G: one number, or one a layer where layers differ
    heads: int  # query heads H
    pattern: str
    cache: str
    dtype: str
    weight_bytes: int  # what one decode step reads of the weights
    kv_bytes_per_token: int  # one sequence, all layers
    conversion: dict[str, Any] | None = None
    encoder: bool = False  # of an encoder-decoder: its context is what the encoder reads
    attention_operations: int = 0  # of a step for each token of context, one sequence, all layers; 0 where that was not noted

    def __post_init__(self) -> None:
        counts = self.groups if isinstance(self.groups, tuple) else (self.groups,)
        if not counts or min(counts) < 1 or self.heads < max(counts):
            raise UserError(f"variant {self.variant!r} has {self.groups} KV heads for {self.heads} query heads")
        if min(self.weight_bytes, self.kv_bytes_per_token, self.attention_operations) < 0:
            raise UserError(f"variant {self.variant!r} has a negative number of bytes or operations")

    @property
    def mean_groups(self) -> float:
        return sum(self.groups) / len(self.groups) if isinstance(self.groups, tuple) else float(self.groups)

    @property
    def groups_label(self) -> str:
        """ "8", or "mean 4.33" where layers differ."""
        return str(self.groups) if isinstance(self.groups, int) else f"mean {self.mean_groups:.3g}"


@dataclass(frozen=True)
class Cell:
    """The samples of one subject at one batch, context and kind.

    kind     decode: one step that adds one token to each of `batch` sequences that hold `context` tokens each;
             prefill: `context` tokens a sequence into an empty cache; ttft: the same, and the choice of the next token.
    samples  seconds, in the order they were taken.
    burst    how many samples in a row were taken before the next subject had its turn.
    cohort   subjects with one (batch, context, cohort) were measured in turns; across cohorts drift does not cancel.
    floor    decode: (weights + KV bytes of the context) over the best read bandwidth, of the run, of the memory they lie in;
             None for other kinds, and where that bandwidth was not measured.
    """

    subject: Subject
    kind: str
    batch: int
    context: int
    capacity: int
    backend: str
    provider: str
    versions: dict[str, str]
    options: dict[str, Any]
    samples: tuple[float, ...]
    burst: int = 1
    cohort: int = 0
    floor: float | None = None
    quality: dict[str, float] | None = None  # for example {"loss": 2.59}, in nats a token
    breakdown: dict[str, float] | None = None  # seconds of one decode step by class (see breakdown.py)
    layers: dict[str, float] | None = None  # of a TensorRT engine: seconds of one decode step by layer, in order
    load: float | None = None  # seconds to open the session, of files that may lie in memory already

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(one_of("kind", self.kind, KINDS))
        for name in ("batch", "context", "capacity", "burst"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} of variant {self.subject.variant!r} is not positive")
        if not self.samples or not all(0 < sample < 1e9 for sample in self.samples):
            raise UserError(f"variant {self.subject.variant!r}, {self.kind}: samples are not positive seconds")
        if self.floor is not None and not 0 < self.floor < 1e9:
            raise UserError(f"variant {self.subject.variant!r}: floor {self.floor} is not a positive number of seconds")
        if self.load is not None and not 0 <= self.load < 1e9:
            raise UserError(f"variant {self.subject.variant!r}: load {self.load} is not a number of seconds")
        if unknown := sorted(set(self.breakdown or ()) - set(BREAKDOWN_CLASSES)):
            raise UserError(one_of("breakdown class", unknown[0], BREAKDOWN_CLASSES))
        for part in (self.breakdown, self.layers):
            if min((part or {"other": 0.0}).values(), default=0.0) < 0:
                raise UserError(f"variant {self.subject.variant!r}: the breakdown has negative seconds")

    @property
    def kv_bytes(self) -> int:
        """KV bytes of the whole batch at this context."""
        return self.batch * self.context * self.subject.kv_bytes_per_token


@dataclass(frozen=True)
class Machine:
    """Where it ran. `cores` are physical, `cpus` the logical ones this process may use; `l3_bytes` 0 where unknown."""

    cpu: str
    cores: int
    cpus: int
    memory_bytes: int
    l3_bytes: int
    flags: tuple[str, ...]
    os: str
    gpus: tuple[str, ...]
    load: float  # one-minute load average before the first sample: what else the machine was doing


@dataclass(frozen=True)
class Bandwidth:
    """Memory read bandwidth, bytes a second, measured before, amid and after the samples. The floor uses the best.

    `threads` is 0 where a GPU read its own memory.
    """

    threads: int
    array_bytes: int
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or not all(0 < sample < 1e18 for sample in self.samples):
            raise UserError("bandwidth samples are not positive bytes a second")

    @property
    def best(self) -> float:
        return max(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Arithmetic:
    """Float32 operations a second, a multiplication and an addition being two, measured before and after the samples."""

    threads: int
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or not all(0 < sample < 1e18 for sample in self.samples):
            raise UserError("arithmetic samples are not positive operations a second")

    @property
    def best(self) -> float:
        return max(self.samples)


@dataclass(frozen=True)
class Results:
    """One run."""

    created: str  # ISO 8601, UTC
    machine: Machine
    versions: dict[str, str]
    settings: dict[str, Any]
    cells: tuple[Cell, ...]
    bandwidth: Bandwidth | None = None
    arithmetic: Arithmetic | None = None
    schema: int = SCHEMA
    notes: tuple[str, ...] = field(default=())

    def with_quality(self, quality: dict[str, dict[str, float]]) -> Results:
        """The same results with quality[variant name], for example {"g3": {"loss": 2.9}}, on each of that variant's cells."""
        cells = [dataclasses.replace(c, quality=quality.get(c.subject.variant, c.quality)) for c in self.cells]
        return dataclasses.replace(self, cells=tuple(cells))

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.schema, **{k: v for k, v in dataclasses.asdict(self).items() if k != "schema"}}

    def save(self, path: str | Path) -> Path:
        """Write to `path`, whole or not at all. Raises UserError when it exists or cannot be written."""
        return write_text(Path(path), json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read `path`. Raises UserError when it is missing, damaged, of another schema, or holds what cannot be."""
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            data = parse(text)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; make one with 'headpool profile'") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder; give the results file in it, {path / 'results.json'} after a sweep") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a results file: {_line(error)}; make one with 'headpool profile'") from None
        if not isinstance(data, dict) or "schema" not in data or "cells" not in data:
            raise UserError(f"{path} is not a results file: it has no schema and cells; make one with 'headpool profile'")
        if data["schema"] != SCHEMA:
            raise UserError(f"{path} has schema {data['schema']!r:.40}, this headpool reads schema {SCHEMA}; measure it again")
        try:
            return decode(cls, data, "results")
        except UserError as error:
            raise UserError(f"{path} is damaged: {_line(error)}") from None


def refuse_twice(what: str, paths: Sequence[str | Path]) -> None:
    """Raises UserError for inputs, each a `what`, of which two are the same."""
    for index, path in enumerate(paths):
        if Path(path).resolve() in {Path(other).resolve() for other in paths[:index]}:
            raise UserError(f"{what} {path} is given twice; its figures could not be told apart, name it once")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
