"""Do all compute the same? Logits of every runtime against transformers', before anything is timed."""

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
    """What runtimes' logits are off by, each measured once. Rows of {runtime, weights, groups, difference}."""

    def __init__(self, place: Place) -> None:
        self.place, self.rows = place, Rows(place.folder / "agreement.jsonl")
        self._references: dict[int, np.ndarray] = {}

    def check(self, runtime: Runtime, weights: str, groups: int) -> dict[str, Any]:
        """`difference` is the largest |Δ logit| of prefill, of prefill in two parts, and of decode steps, before and after a
        rewind, over the standard deviation of the logits. Raises EngineError where fp32 weights are off by more than TOLERANCE.
        """
        key = {"runtime": runtime.name, "weights": weights, "groups": groups}
        row = self.rows.find(key) or self.rows.add({**key, "difference": self._difference(runtime, weights, groups)})
        if weights == "fp32" and not row["difference"] <= TOLERANCE:
            raise EngineError(
                f"{runtime.name} computes something else with {groups} KV heads: logits off by {row['difference']:.2g} "
                f"of their standard deviation, at most {TOLERANCE:g} are allowed"
            )
        return row

    def _difference(self, runtime: Runtime, weights: str, groups: int) -> float:
        with Opener(runtime, weights, groups, self.place, room=0)(capacity=TOKENS) as session:
            tokens = np.random.default_rng(1).integers(0, session.config.vocab_size, TOKENS)
            expected = self._expected(groups, tokens)
            found = differences(session, [tokens], [expected])
            session.rewind(TOKENS - STEPS)  # as between bursts
            again = [session.decode(tokens[at : at + 1])[0] - expected[at] for at in range(TOKENS - STEPS, TOKENS)]
            found["decode after a rewind"] = float(np.nan_to_num(np.abs(again), nan=np.inf).max())
            return max(found.values()) / float(expected.std())

    def _expected(self, groups: int, tokens: np.ndarray) -> np.ndarray:
        if groups not in self._references:
            self._references[groups] = transformers_logits(self.place.checkpoint(groups) / "huggingface")(tokens)
        return self._references[groups]
