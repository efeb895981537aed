"""Latency of many subjects at once, in turns, through exporter.engines.base.Session only.

Everything that shares a batch and a context is alive at the same time and measured in rounds: each subject takes a short
burst of samples, then the next, and every other round runs backwards, so a drift of the machine falls on all alike and
cancels in their ratios. Where not all fit into memory they are split, in order, into cohorts of sessions that do.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import psutil

from exporter.engines.base import Session
from exporter.errors import UserError, one_of
from profiles import stats
from profiles.results import KINDS, Cell, Subject

Clock = Callable[[], float]
Progress = Callable[[int, int, str], None]  # samples taken, samples in all, what is being measured


class OpenSession(Protocol):
    def __call__(self, *, batch: int, capacity: int, profile_to: Path | None = None) -> Session: ...


@runtime_checkable
class TimesItself(Protocol):
    """A session in another process, which takes the times there: what lies between the two is in no sample."""

    def timed_prefill(self, prompts: list[np.ndarray]) -> dict[str, float]:
        """Seconds of `prefill` and of `ttft`, both of one run from an empty cache."""

    def timed_steps(self, tokens: np.ndarray, settle: int, count: int) -> list[float]:
        """Seconds of each of `count` decode steps after `settle` others; then the sequences are as long as before."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    samples          of decode, a cell (as many whole bursts as a 99th percentile needs), taken in bursts of `burst`, or of a
                     quarter of them where they are few, as an interval needs four. Each burst comes
                     after `settle` untimed steps that bring back to the caches what the others pushed out, as in real
                     decoding, where steps follow one another. (Measured: a model of 42 MB under a cache of 480 MB is 1.9
                     times slower in the first step of its turn, and as fast as alone from the sixth on.)
    warmup           untimed decode steps after opening; for prefill it is one untimed prefill.
    prefill_samples  of prefill and ttft, a cell; both come from the same runs.
    seconds          bound on each cell's share of the sampling time; it stops between rounds, after four of them at the least.
    capacity         cache rows of every session; None: just what the context needs.
    memory           bytes that live sessions may take together; None: 60 % of the memory now available.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    kinds: tuple[str, ...] = KINDS
    samples: int = 104
    burst: int = 8
    settle: int = 8
    warmup: int = 8
    prefill_samples: int = stats.ENOUGH
    seconds: float | None = None
    capacity: int | None = None
    memory: int | None = None
    seed: int = 0

    @property
    def turn(self) -> int:
        """Decode samples of a burst."""
        return max(1, min(self.burst, self.samples // stats.BURSTS))

    def __post_init__(self) -> None:
        for name in ("contexts", "batches", "kinds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; name at least one")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(one_of("kind", kind, KINDS))
        counts = {name: getattr(self, name) for name in ("samples", "burst", "prefill_samples")}
        counts |= {"context": min(self.contexts), "batch": min(self.batches)}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name} {value} is not positive")
        for name in ("warmup", "settle"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative")
        if self.seconds is not None and not self.seconds > 0:
            raise UserError(f"seconds {self.seconds} is not a positive bound on the time of a cell")
        if self.capacity is not None and self.capacity <= max(self.contexts):
            raise UserError(f"capacity {self.capacity} has no room for a token after {max(self.contexts)} tokens of context")

    def capacity_at(self, context: int) -> int:
        """Cache rows at `context`: a multiple of 8 with room for the sampled token."""
        return self.capacity or (context + 8) // 8 * 8

    @property
    def steps(self) -> int:
        """Timed calls of one subject at one batch and context, for a progress bar."""
        return self.samples * ("decode" in self.kinds) + self.prefill_samples * bool({"prefill", "ttft"} & set(self.kinds))


def measure(
    subjects: Sequence[tuple[Subject, OpenSession]],
    plan: Plan,
    *,
    probe: Callable[[], object] = lambda: None,
    progress: Progress = lambda done, total, what: None,
    clock: Clock = time.perf_counter,
) -> list[Cell]:
    """Cells without floors, in the order of the subjects within each batch and context.

    `probe` (a bandwidth measurement) runs before, in the middle of and after each cohort's decode samples. Raises UserError and
    what the sessions raise; every session that was opened is closed.
    """
    if not subjects:
        raise UserError("there is nothing to measure: no variant was chosen")
    done, total = 0, plan.steps * len(subjects) * len(plan.contexts) * len(plan.batches)

    def advance(bench: _Bench, count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, f"{bench.subject.variant}, {bench.context} tokens, batch {bench.session.batch}")

    cells: list[Cell] = []
    planned = 0
    for batch, context in itertools.product(plan.batches, plan.contexts):
        memory = plan.memory or int(0.6 * psutil.virtual_memory().available)
        for index, cohort in enumerate(cohorts([s for s, _ in subjects], batch, plan.capacity_at(context), memory)):
            cells += _measure_cohort([subjects[i] for i in cohort], batch, context, index, plan, probe, advance, clock)
            done = planned = planned + plan.steps * len(cohort)  # a cohort whose time was up is done too
    return cells


def cohorts(subjects: Sequence[Subject], batch: int, capacity: int, memory: int) -> list[list[int]]:
    """Indices of `subjects` split so that each part fits into `memory` bytes, a part being at least one subject.

    What differs in nothing but its KV heads stays together where it fits: those ratios are what a run is made for.

    A session is taken to need its weights twice (a runtime may hold a copy in a layout of its own) and its caches twice (a
    concat cache is written anew at every step).
    """
    families: dict[tuple[str, ...], list[int]] = {}
    for index, subject in enumerate(subjects):
        families.setdefault((subject.pattern, subject.cache, subject.dtype), []).append(index)
    needs = [2 * subject.weight_bytes + 2 * batch * capacity * subject.kv_bytes_per_token for subject in subjects]
    parts: list[list[int]] = []
    free = 0
    for family in families.values():
        whole = sum(needs[index] for index in family)
        for index in family:
            if not parts or needs[index] > free or (index == family[0] and free < whole <= memory):
                parts.append([])
                free = memory
            parts[-1].append(index)
            free -= needs[index]
    return [sorted(part) for part in parts]


@dataclass
class _Bench:
    """One live session with its tokens and the samples taken so far."""

    subject: Subject
    session: Session
    context: int
    prompts: list[np.ndarray]
    tokens: np.ndarray
    load: float
    samples: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def prefill(self, clock: Clock) -> None:
        if isinstance(self.session, TimesItself):
            for kind, seconds in self.session.timed_prefill(self.prompts).items():
                self.samples[kind].append(seconds)
            return
        self.session.reset()
        start = clock()
        logits = self.session.prefill(self.prompts)
        filled = clock()
        np.argmax(logits, axis=-1)
        self.samples["ttft"].append(clock() - start)
        self.samples["prefill"].append(filled - start)

    def fill(self) -> None:
        """Have exactly `context` tokens in the cache."""
        if not (self.session.lengths == self.context).all():
            self.session.reset()
            self.session.prefill(self.prompts)

    def decode(self, settle: int, count: int, clock: Clock) -> None:
        """`count` samples after `settle` untimed steps."""
        if isinstance(self.session, TimesItself):
            self.samples["decode"] += self.session.timed_steps(self.tokens, settle, count)
            return
        for _ in range(settle):
            self.session.decode(self.tokens)
            self.session.rewind(self.context)
        for _ in range(count):
            start = clock()
            self.session.decode(self.tokens)
            self.samples["decode"].append(clock() - start)
            self.session.rewind(self.context)


def _measure_cohort(
    chosen: Sequence[tuple[Subject, OpenSession]],
    batch: int,
    context: int,
    cohort: int,
    plan: Plan,
    probe: Callable[[], object],
    advance: Callable[[_Bench, int], None],
    clock: Clock,
) -> list[Cell]:
    with contextlib.ExitStack() as stack:
        benches = []
        for subject, open_session in chosen:
            start = clock()
            session = open_session(batch=batch, capacity=plan.capacity_at(context))
            load = clock() - start
            stack.callback(session.close)
            benches.append(_Bench(subject, session, context, *random_tokens(session, context, plan.seed), load))
        stack.enter_context(_no_garbage_collection())
        if {"prefill", "ttft"} & set(plan.kinds):
            _sample_prefill(benches, plan, advance, clock)
        if "decode" in plan.kinds:
            _sample_decode(benches, plan, probe, advance, clock)
        return [_cell(bench, kind, plan, cohort) for bench in benches for kind in KINDS if kind in plan.kinds]


def _sample_prefill(benches: list[_Bench], plan: Plan, advance: Callable[[_Bench, int], None], clock: Clock) -> None:
    for bench in benches:
        bench.fill()
    for turns in _rounds(benches, plan.prefill_samples, plan, clock):
        for bench in turns:
            bench.prefill(clock)
            advance(bench, 1)


def _sample_decode(
    benches: list[_Bench], plan: Plan, probe: Callable[[], object], advance: Callable[[_Bench, int], None], clock: Clock
) -> None:
    for bench in benches:
        bench.fill()
        bench.decode(plan.warmup, 0, clock)
    rounds = -(-plan.samples // plan.turn)
    probe()
    for number, turns in enumerate(_rounds(benches, rounds, plan, clock)):
        if number and number == rounds // 2:
            probe()
        for bench in turns:
            count = min(plan.turn, plan.samples - number * plan.turn)
            bench.decode(plan.settle, count, clock)
            advance(bench, count)
    probe()


def _rounds(benches: list[_Bench], rounds: int, plan: Plan, clock: Clock) -> Iterator[list[_Bench]]:
    """The benches once a round, forwards and backwards by turns, until the time is up."""
    start = clock()
    for number in range(rounds):
        if plan.seconds is not None and number >= stats.BURSTS and clock() - start > plan.seconds * len(benches):
            return
        yield benches if number % 2 == 0 else benches[::-1]


def random_tokens(session: Session, context: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Random prompts [context] and next tokens [B], the same for every subject with this vocabulary and batch."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, session.config.vocab_size, size=(session.batch, context + 1), dtype=np.int64)
    return [np.ascontiguousarray(row[:-1]) for row in drawn], np.ascontiguousarray(drawn[:, -1])


def _cell(bench: _Bench, kind: str, plan: Plan, cohort: int) -> Cell:
    info = bench.session.info
    return Cell(
        subject=bench.subject,
        kind=kind,
        batch=bench.session.batch,
        context=bench.context,
        capacity=bench.session.capacity,
        backend=info.backend,
        provider=info.provider,
        versions=dict(info.versions),
        options=json.loads(json.dumps(info.options, default=str)),
        samples=tuple(bench.samples[kind]),
        burst=plan.turn if kind == "decode" else 1,
        cohort=cohort,
        load=bench.load,
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
