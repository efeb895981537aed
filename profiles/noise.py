"""Whether the machine was quiet enough for its figures to be quoted."""

from __future__ import annotations

from collections.abc import Sequence

from profiles.results import Results

BUSY = 0.8  # typical bandwidth over the best, below which a run is called disturbed


def busy(results: Results) -> str | None:
    """A warning where the memory bandwidth of the run was often far below its best: something else was using the machine."""
    if results.bandwidth is None or results.bandwidth.median >= BUSY * results.bandwidth.best:
        return None
    share = results.bandwidth.median / results.bandwidth.best
    return f"Busy machine: memory bandwidth typically {100 * share:.0f} % of its best. Measure again."


def busy_runs(results: Sequence[Results]) -> list[str]:
    """The warnings of several runs, each with the number of its run where there is more than one."""
    texts = [(number, busy(result)) for number, result in enumerate(results, 1)]
    return [f"Run {number}: {text}" if len(results) > 1 else text for number, text in texts if text]
