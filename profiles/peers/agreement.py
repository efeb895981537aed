"""Do all compute the same? Logits of every runtime and sequence against transformers', before anything is timed."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.errors import EngineError
from profiles.benchmarks.logits import STEPS, differences, transformers_logits
from profiles.benchmarks.record import Rows
from profiles.peers.runtimes import Opener, Place, Runtime

TOKENS = 64  # the last of which are decoded one by one
TOLERANCE = 1e-3  # of the logits' standard deviation, in fp32: the largest difference of any logit


class Agreement:
    """What runtimes' logits are off by, each measured once. Rows of {runtime, weights, groups, batch, difference}."""

    def __init__(self, place: Place, batch: int) -> None:
        self.place, self.batch, self.rows = place, batch, Rows(place.folder / "agreement.jsonl")
        self._references: dict[int, list[np.ndarray]] = {}

    def check(self, runtime: Runtime, weights: str, groups: int) -> dict[str, Any]:
        """`difference` is the largest |Δ logit| of prefill, of prefill in two parts, and of decode steps, before and after a
        rewind, over the standard deviation of the logits. Raises EngineError where fp32 weights are off by more than TOLERANCE.
        """
        key = {"runtime": runtime.name, "weights": weights, "groups": groups, "batch": self.batch}
        row = self.rows.find(key) or self.rows.add({**key, "difference": self._difference(runtime, weights, groups)})
        if weights == "fp32" and not row["difference"] <= TOLERANCE:
            raise EngineError(
                f"{runtime.name} computes something else with {groups} KV heads: logits off by {row['difference']:.2g} "
                f"of their standard deviation, at most {TOLERANCE:g} are allowed"
            )
        return row

    def _difference(self, runtime: Runtime, weights: str, groups: int) -> float:
        with Opener(runtime, weights, groups, self.place, room=0)(batch=self.batch, capacity=TOKENS) as session:
            tokens = np.random.default_rng(1).integers(0, session.config.vocab_size, (self.batch, TOKENS))
            expected = self._expected(groups, tokens)
            found = differences(session, list(tokens), expected, in_step=True)
            session.rewind(TOKENS - STEPS)  # as between bursts
            truth = np.stack(expected, axis=1)
            again = [session.decode(tokens[:, at]) - truth[at] for at in range(TOKENS - STEPS, TOKENS)]
            found["decode after a rewind"] = float(np.nan_to_num(np.abs(again), nan=np.inf).max())
            return max(found.values()) / float(truth.std())

    def _expected(self, groups: int, tokens: np.ndarray) -> list[np.ndarray]:
        """float32 [T, V] a sequence."""
        if groups not in self._references:
            logits = transformers_logits(self.place.checkpoint(groups) / "huggingface")
            self._references[groups] = [logits(sequence) for sequence in tokens]
        return self._references[groups]
