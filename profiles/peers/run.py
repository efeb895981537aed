"""The whole comparison, a part at a time: one part is one kind of weights and one number of KV heads, all runtimes in turns.

OUT/models/            weights and every runtime's model of them; may be deleted when all is measured
OUT/agreement.jsonl    how far each runtime's logits are from transformers'
OUT/fp32-g16.json, …   the parts, results files: a run that was stopped goes on with the next one
OUT/latency.json       all of them as one results file, for headpool report and compare
OUT/peers.json         the same with the comparison, what was left out and why
OUT/peers.md           the comparison as tables
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from exporter.errors import EngineError, UserError
from profiles.bandwidth import BandwidthProbe, floor_seconds
from profiles.machine import fingerprint, versions
from profiles.measure import Plan, Progress, measure
from profiles.peers.agreement import Agreement
from profiles.peers.models import make_checkpoint
from profiles.peers.runtimes import Opener, Place, Runtime, make_model
from profiles.results import Cell, Results

Say = Callable[[str], None]
MEMORY = 0.85  # of what is available: workers hold what they need, and little of a model lies in two of them


@dataclass(frozen=True)
class Options:
    """What to compare. `prompt` is the length of prefills, 0: none; they are measured with fp32 weights only."""

    config: Path
    groups: tuple[int, ...]
    weights: tuple[str, ...]
    contexts: tuple[int, ...]
    samples: int
    prompt: int
    prefill_samples: int

    def plans(self, weights: str) -> tuple[Plan, ...]:
        decode = Plan(self.contexts, kinds=("decode",), samples=self.samples)
        if not self.prompt or weights != "fp32":
            return (decode,)
        return (decode, Plan((self.prompt,), kinds=("prefill", "ttft"), prefill_samples=self.prefill_samples))


@dataclass(frozen=True)
class Missing:
    """A runtime that is not in the figures of these weights, and the reason."""

    runtime: str
    weights: str
    reason: str


class Comparison:
    """Raises UserError for a part that was measured with other options."""

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        place: Place,
        options: Options,
        say: Say,
        progress: Progress = lambda done, total, what: None,
    ) -> None:
        self.runtimes, self.place, self.options, self.say, self.progress = runtimes, place, options, say, progress
        self.agreement = Agreement(place)
        self.missing: list[Missing] = []

    def prepare(self) -> None:
        """Weights, every runtime's model of them, and the check of its logits; what fails is left out, by name."""
        for groups in self.options.groups:
            if not self.place.checkpoint(groups).exists():
                self.say(f"weights with {groups} KV heads")
                self.place.checkpoint(groups).parent.mkdir(parents=True, exist_ok=True)
                make_checkpoint(self.options.config, groups, self.place.checkpoint(groups))
        for weights in self.options.weights:
            for runtime in self.runtimes:
                self._prepare(runtime, weights)

    def _prepare(self, runtime: Runtime, weights: str) -> None:
        try:
            for groups in self.options.groups:
                self.say(f"{runtime.name}: {weights}, {groups} KV heads")
                make_model(runtime, weights, groups, self.place)
                self.agreement.check(runtime, weights, groups)
        except EngineError as error:
            self.missing.append(Missing(runtime.name, weights, str(error)))
            self.say(f"left out, {weights}: {error}")

    def present(self, weights: str) -> list[Runtime]:
        left_out = {missing.runtime for missing in self.missing if missing.weights == weights}
        return [runtime for runtime in self.runtimes if runtime.name not in left_out]

    def measure(self) -> list[Results]:
        return [self._part(weights, groups) for weights in self.options.weights for groups in self.options.groups]

    def _part(self, weights: str, groups: int) -> Results:
        path = self.place.folder / f"{weights}-g{groups}.json"
        plans = self.options.plans(weights)
        settings = {
            "plans": json.loads(json.dumps([dataclasses.asdict(plan) for plan in plans])),
            "threads": self.place.threads,
            "runtimes": [runtime.name for runtime in self.present(weights)],
        }
        if path.exists():
            part = Results.load(path)
            if part.settings != settings:
                raise UserError(f"{path} was measured with other options or runtimes; remove it to measure it again")
            return part
        machine, software = fingerprint(), versions()
        probe = BandwidthProbe(self.place.threads)
        cells: list[Cell] = []
        for plan in plans:
            openers = [Opener(r, weights, groups, self.place, plan.settle + plan.turn) for r in self.present(weights)]
            plan = dataclasses.replace(plan, memory=int(MEMORY * psutil.virtual_memory().available))
            self.say(f"measuring {weights}, {groups} KV heads, {', '.join(plan.kinds)}")
            cells += measure([(opener.subject, opener) for opener in openers], plan, probe=probe, progress=self.progress)
        part = Results(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine,
            versions=software,
            settings=settings,
            cells=tuple(cells),
            bandwidth=probe.result(),
        )
        part.save(path)
        return part


def together(parts: Sequence[Results]) -> Results:
    """One results file: cells of different parts in cohorts of their own, one floor, of the best bandwidth of all."""
    cells: list[Cell] = []
    for part in parts:
        first = 1 + max((cell.cohort for cell in cells), default=-1)
        cells += [dataclasses.replace(cell, cohort=first + cell.cohort) for cell in part.cells]
    read = [part.bandwidth for part in parts if part.bandwidth]
    bandwidth = dataclasses.replace(read[0], samples=tuple(sample for each in read for sample in each.samples))
    cells = [dataclasses.replace(cell, floor=floor_seconds(cell, bandwidth.best)) for cell in cells]
    return dataclasses.replace(parts[0], cells=tuple(cells), bandwidth=bandwidth)
