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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from exporter.checkpoint import open_source
from exporter.errors import EngineError, UserError
from profiles.bandwidth import BandwidthProbe, floor_seconds
from profiles.machine import fingerprint, versions
from profiles.measure import OpenSession, Plan, Progress, measure
from profiles.peers.agreement import Agreement
from profiles.peers.models import make_checkpoint
from profiles.peers.process import WorkerError
from profiles.peers.runtimes import Opener, Place, Runtime, make_model
from profiles.reading import beside
from profiles.results import Cell, Results, Subject

Say = Callable[[str], None]
MEMORY = 0.85  # of what is available: workers hold what they need, and little of a model lies in two of them
TOGETHER = 1 << 62  # bytes of memory that measure.py takes for granted: what shares it is chosen here


@dataclass(frozen=True)
class Options:
    """What to compare. `prompt` is the length of prefills, 0: none; they are measured with fp32 weights only."""

    config: Path
    groups: tuple[int, ...]
    weights: tuple[str, ...]
    batch: int
    contexts: tuple[int, ...]
    samples: int
    prompt: int
    prefill_samples: int

    def plans(self, weights: str) -> tuple[Plan, ...]:
        decode = Plan(self.contexts, (self.batch,), kinds=("decode",), samples=self.samples)
        if not self.prompt or weights != "fp32":
            return (decode,)
        return (decode, Plan((self.prompt,), (self.batch,), ("prefill", "ttft"), prefill_samples=self.prefill_samples))


@dataclass(frozen=True)
class Missing:
    """A runtime that is not in the figures of these weights, or not in all, and the reason."""

    runtime: str
    weights: str
    reason: str


class Comparison:
    """Raises UserError for models of another config, and for a part that was measured with other options."""

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        place: Place,
        options: Options,
        say: Say,
        progress: Progress = lambda done, total, what: None,
    ) -> None:
        self.runtimes, self.place, self.options, self.say, self.progress = runtimes, place, options, say, progress
        self.agreement = Agreement(place, options.batch)
        self.missing: list[Missing] = []

    def prepare(self) -> None:
        """Weights, every runtime's model of them, and the check of its logits; what fails is left out, by name."""
        config = open_source(self.options.config).config
        for groups in self.options.groups:
            checkpoint = self.place.checkpoint(groups)
            if not checkpoint.exists():
                self.say(f"weights with {groups} KV heads")
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                make_checkpoint(self.options.config, groups, checkpoint)
            elif open_source(checkpoint / "huggingface").config != config.with_kv_heads(groups):
                raise UserError(f"{checkpoint} holds a model of another config than {self.options.config}; name another OUT")
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
        runs: list[list[Cell]] = []
        for whole, context in ((plan, context) for plan in plans for context in plan.contexts):
            plan = dataclasses.replace(whole, contexts=(context,), memory=int(MEMORY * psutil.virtual_memory().available))
            room = plan.settle + plan.turn
            openers = [Opener(runtime, weights, groups, self.place, room) for runtime in self.present(weights)]
            config = open_source(self.place.checkpoint(groups) / "huggingface").config
            reads = [beside(openers[0].subject, config, self.place.threads)] if "decode" in plan.kinds else []
            for subjects in in_turns(openers, plan, config.vocab_size):
                where = f"{groups} KV heads, {context:,} tokens, {', '.join(plan.kinds)}"
                chosen = dataclasses.replace(plan, memory=TOGETHER)
                runs.append(self._in_turns(reads, subjects, chosen, probe, weights, where))
        part = Results(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine,
            versions=software,
            settings=settings,
            cells=apart(runs),
            bandwidth=probe.result(),
        )
        part.save(path)
        return part

    def _in_turns(
        self,
        reads: list[tuple[Subject, OpenSession]],
        subjects: list[tuple[Subject, Opener]],
        plan: Plan,
        probe: BandwidthProbe,
        weights: str,
        where: str,
    ) -> list[Cell]:
        """The cells of `subjects`; another runtime that fails is left out from here on, the rest measured without it."""
        while True:
            self.say(f"measuring {weights}, {where}: {', '.join(subject.pattern for subject, _ in subjects)}")
            try:
                return measure([*reads, *subjects], plan, probe=probe, progress=self.progress)
            except WorkerError as error:
                others = [each for each in subjects if each[1].runtime.name != error.name]
                if not any(opener.runtime.name == error.name and not opener.runtime.own for _, opener in subjects):
                    raise
                self.missing.append(Missing(error.name, weights, f"{where}: {error}"))
                self.say(f"left out from here on, {weights}: {error}")
                subjects = others


def in_turns(openers: Sequence[Opener], plan: Plan, vocabulary: int) -> list[list[tuple[Subject, Opener]]]:
    """What is measured in one go by a plan of one context: all where memory holds it, else headpool with each of the others, of
    headpool the first pattern alone where even that is too much.

    Of a prompt, every other runtime may hold the logits of all tokens, and the one that reads it the scores of a layer.
    """
    subjects = [(opener.subject, opener) for opener in openers]
    own = [each for each in subjects if each[1].runtime.own]
    others = [each for each in subjects if not each[1].runtime.own]
    [batch], [context], memory = plan.batches, plan.contexts, plan.memory or 0

    def fits(together: Sequence[tuple[Subject, Opener]]) -> bool:
        tokens, read = batch * plan.capacity_at(context), together[0][0]
        takes = sum(bytes_of(subject, tokens) for subject, _ in together)
        takes += read.weight_bytes + tokens * read.kv_bytes_per_token  # what is read in turns with them
        foreign = sum(not opener.runtime.own for _, opener in together)
        prompts = 4 * batch * context * (foreign * vocabulary + context * max(subject.heads for subject, _ in together))
        return takes + prompts <= memory

    if not others or fits(subjects):
        return [subjects]
    return [[*own, other] if fits([*own, other]) else [*own[:1], other] for other in others]


def bytes_of(subject: Subject, tokens: int) -> int:
    """Of a session: its weights and a copy in a layout of its own; its caches, twice where they are written anew or grow."""
    return 2 * subject.weight_bytes + (1 if subject.cache == "static" else 2) * tokens * subject.kv_bytes_per_token


def apart(runs: Iterable[Iterable[Cell]]) -> tuple[Cell, ...]:
    """Cells of all runs, those of each in cohorts of their own."""
    cells: list[Cell] = []
    for run in runs:
        first = 1 + max((cell.cohort for cell in cells), default=-1)
        cells += [dataclasses.replace(cell, cohort=first + cell.cohort) for cell in run]
    return tuple(cells)


def together(parts: Sequence[Results]) -> Results:
    """One results file: cells of different parts in cohorts of their own, one floor, of the best bandwidth of all."""
    cells = apart(part.cells for part in parts)
    read = [part.bandwidth for part in parts if part.bandwidth]
    bandwidth = dataclasses.replace(read[0], samples=tuple(sample for each in read for sample in each.samples))
    cells = tuple(dataclasses.replace(cell, floor=floor_seconds(cell, bandwidth.best)) for cell in cells)
    return dataclasses.replace(parts[0], cells=cells, bandwidth=bandwidth)
