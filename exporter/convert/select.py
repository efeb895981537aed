"""The select stage: KV heads for each layer, by what each layer loses and what each number of heads costs.

    calibration tokens → loss by layer and KV heads (kept on disk) → Pareto front → the plan for a target

The front adds up losses that were measured one layer at a time; the plan that is chosen is then measured as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint, scan
from exporter.config import ModelConfig, group_counts
from exporter.convert.calibration import CALIBRATIONS, calibration_tokens
from exporter.convert.knapsack import Point, pareto_front
from exporter.convert.methods import SHARINGS, Grouping, Method, check_method
from exporter.convert.plan import KVPlan, read_object
from exporter.convert.replace_one import MEASURED, ReplaceOne
from exporter.decode import decode
from exporter.errors import UserError
from exporter.files import replacing
from exporter.seq2seq_config import require_decoder

SCHEMA = 1
TICKS = 10_000_000  # a second: latencies are added up as whole numbers of 0.1 µs
TRIES = 4  # plans measured as a whole before a bound on the loss is met
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class How:
    """How layers are converted, in the words of `convert`. `calibration` is also what every method is measured on."""

    method: Method = "optimal"
    grouping: Grouping = "contiguous"
    calibration: str | None = None  # None is `self`
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What layers lose, on disk: rows (layer, KV heads, nats a token). `tokens` are the windows it was measured on."""

    model: str
    sha256: str
    how: How
    tokens: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[int, int, float], ...] = ()
    text: str = ""  # sha256 of the calibration text; empty: it was none
    schema: int = SCHEMA

    def by_layer(self) -> dict[int, dict[int, float]]:
        found: dict[int, dict[int, float]] = {}
        for layer, count, loss in self.losses:
            found.setdefault(layer, {})[count] = loss
        return found


def candidates(config: ModelConfig) -> list[list[int]]:
    """For each layer the numbers of KV heads it could have: those it has, and fewer. Most first."""
    return [[count for count in group_counts(config.num_heads) if count <= held] for held in config.kv_heads]


class Selection:
    """Measures a checkpoint's layers and chooses among them. `store` is the file that keeps the measurements: what it holds
    is not measured again, and it is whole after every layer. Raises UserError where it is another model's or another way's."""

    def __init__(self, checkpoint: Checkpoint, how: How, store: Path, progress: Progress) -> None:
        require_decoder(checkpoint.config, checkpoint.name, "select")
        folding = how.method in SHARINGS
        check_method(checkpoint.config, how.method, how.seed, how.grouping, how.calibration if folding else None)
        if not checkpoint.files:
            raise UserError(f"{checkpoint.name} has random weights, and nothing to lose; give a checkpoint")
        self.checkpoint, self.how, self.store, self.progress = checkpoint, how, store, progress
        self.source = "self" if how.calibration in (None, "none") else str(how.calibration)
        self.counts = candidates(checkpoint.config)

    def measure(self) -> None:
        """Fill in what is not measured yet."""
        self.measured = self._load()
        known = self.measured.by_layer()
        done = {layer for layer, counts in enumerate(self.counts) if set(counts[1:]) <= set(known.get(layer, {}))}
        config, how = self.checkpoint.config, self.how
        on_tokens = how.method in SHARINGS and how.calibration != "none"
        self.replacing = ReplaceOne(
            config,
            self.checkpoint.weights,
            np.array(self.measured.tokens, np.int64),
            how.method,
            how.seed,
            how.grouping,
            on_tokens,
            self.progress,
        )
        if len(done) == config.num_layers:
            return
        for layer, found in self.replacing.losses([counts[1:] for counts in self.counts], done):
            rows = ((layer, count, loss) for count, loss in found.items())
            self.measured = dataclasses.replace(self.measured, losses=(*self.measured.losses, *rows))
            self._save()

    def front(self, costs: list[dict[int, int]]) -> list[Point]:
        """The Pareto front of plans, by what KV heads cost in each layer. `kv_heads_of` reads its points."""
        known = self.measured.by_layer()
        return pareto_front(
            [
                [(cost[count], known[layer][count] if count != counts[0] else 0.0) for count in counts]
                for layer, (counts, cost) in enumerate(zip(self.counts, costs, strict=True))
            ]
        )

    def kv_heads_of(self, point: Point) -> tuple[int, ...]:
        return tuple(counts[choice] for counts, choice in zip(self.counts, point.choices, strict=True))

    def within_loss(self, front: list[Point], bound: float) -> tuple[Point, float]:
        """The cheapest of the plans measured as a whole whose loss is at most `bound` nats a token, and that loss.

        Losses of layers add up only nearly. What a measured plan's own loss is of its sum says where on the front the next one
        is looked for, between the dearest that is above the bound and the cheapest that is not; after TRIES plans, what holds
        is enough.
        """
        above, holds, found = -1, len(front) - 1, None  # the last has as many heads as there are
        ratio, tries = 1.0, 0
        while holds - above > 1 and (tries < TRIES or found is None):
            guess = next(at for at, point in enumerate(front) if point.loss * ratio <= bound or at == holds)
            at = min(max(guess, above + 1), holds - 1) if tries < TRIES else (above + holds) // 2
            loss, tries = self.loss_of(front[at]), tries + 1
            if loss <= bound:
                holds, found = at, loss
            else:
                above = at
            ratio = loss / front[at].loss if front[at].loss > 0 else ratio
        return front[holds], self.loss_of(front[holds]) if found is None else found

    def loss_of(self, point: Point) -> float:
        """Nats a token of the plan as a whole, measured."""
        kv_heads = self.kv_heads_of(point)
        return 0.0 if kv_heads == self.checkpoint.config.kv_heads else self.replacing.loss_of(kv_heads)

    def plan(self, point: Point, target: dict[str, float], found: dict[str, float]) -> KVPlan:
        config, how = self.checkpoint.config, self.how
        return KVPlan(
            model=self.checkpoint.name,
            heads=config.num_heads,
            kv_heads_before=config.kv_heads,
            kv_heads=self.kv_heads_of(point),
            method=how.method,
            grouping=how.grouping,
            calibration=self._calibration(),
            seed=how.seed,
            target=target,
            found=found,
            kv_digest=self.checkpoint.kv_digest(),
        )

    def _calibration(self) -> str | None:
        """As the plan has it: a text by a path that holds wherever the plan is followed."""
        given = self.how.calibration if self.how.method in SHARINGS else None
        return given if given is None or given in CALIBRATIONS else str(Path(given).absolute())

    def _load(self) -> Measured:
        """What `store` holds, or a new start with tokens of its own."""
        digest = scan(self.checkpoint.files)
        text = Path(self.source)
        text_digest = scan([text]) if self.source not in CALIBRATIONS and text.is_file() else ""
        if self.store.exists():
            data = read_object(self.store, "measurements")
            if "losses" not in data:
                raise UserError(f"{self.store} holds no measurements; choose another --measurements")
            held, other = decode(Measured, data, str(self.store)), "; choose another --measurements, or remove it"
            if held.sha256 != digest:
                raise UserError(f"{self.store} holds measurements of other weights, {held.model}'s{other}")
            if (held.how, held.schema) != (self.how, SCHEMA):
                raise UserError(
                    f"{self.store} holds measurements of {held.model} by method {held.how.method}, grouping "
                    f"{held.how.grouping}, calibration {held.how.calibration or 'self'}, seed {held.how.seed}, not of what is "
                    f"asked for{other}"
                )
            if held.text != text_digest:
                raise UserError(f"{self.store} holds measurements on another text than {text} holds now{other}")
            if not self._sound(held):
                raise UserError(
                    f"{self.store} is damaged, its tokens or layers are not {held.model}'s; remove it to begin anew"
                )
            return held
        tokens = calibration_tokens(self.checkpoint, self.source, self.how.seed, self.progress, MEASURED)
        assert tokens is not None
        return Measured(self.checkpoint.name, digest, self.how, tuple(map(tuple, tokens.tolist())), text=text_digest)

    def _sound(self, held: Measured) -> bool:
        lengths, ids = {len(window) for window in held.tokens}, [token for window in held.tokens for token in window]
        fits = len(lengths) == 1 and ids and min(ids) >= 0 and max(ids) < self.checkpoint.config.vocab_size
        layers = range(self.checkpoint.config.num_layers)
        return bool(fits) and all(layer in layers and count in self.counts[layer] for layer, count, _ in held.losses)

    def _save(self) -> None:
        with replacing(self.store) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self.measured), ensure_ascii=False) + "\n", "utf-8")


def kv_costs(config: ModelConfig) -> list[dict[int, int]]:
    """A layer's KV heads as its cost: a token's KV cache is that times 2 D."""
    return [{count: count for count in counts} for counts in candidates(config)]


def latency_costs(config: ModelConfig, seconds: Mapping[int, float]) -> list[dict[int, int]]:
    """A layer's share of a decode step in ticks: `seconds` are of whole models with one number of KV heads in every layer."""
    share = {count: round(value * TICKS / config.num_layers) for count, value in seconds.items()}
    return [{count: share[count] for count in counts} for counts in candidates(config)]


def check_reachable(costs: list[dict[int, int]], limit: float, unit: float, target: str, what: str) -> None:
    """Refuse a limit below the cheapest plan there is; `unit` is what one of `costs` is in the words of the target."""
    least = sum(min(cost.values()) for cost in costs)
    if least > limit * (1 + 1e-9):
        nearest = least * unit
        digits = 10.0 ** (3 - math.floor(math.log10(nearest)))
        raise UserError(
            f"{target} {limit * unit:.4g} cannot be met: the least is {math.ceil(nearest * digits) / digits:g} {what}; "
            "choose that or more"
        )


def dearest(front: list[Point], limit: float) -> Point:
    """The point with the least loss whose cost is at most `limit`, which one has."""
    return [point for point in front if point.cost <= limit * (1 + 1e-9)][-1]  # a third of 30 heads is 10, in floats too
