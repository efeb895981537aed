"""Whether the machine was quiet enough for its figures to be quoted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from profiles import stats
from profiles.results import Results

BUSY = 0.8  # typical bandwidth over the best, below which a run is called disturbed

# A machine that is busy from the first sample to the last reads memory slowly all the time, so that the bandwidth's median
# lies near its best; but steps that have to share the CPUs scatter: p90 / p50 of the typical cell, since even in a quiet run a
# single one may meet a hiccup. The committed runs are quiet by it (tests/profiles/test_compare.py). The load average that a run
# records decides nothing: it outlives by a minute what caused it, the export just before the run for one. What slows every step
# alike cannot be told from a slower machine.
SPREAD = 1.2


def busy(results: Results) -> str | None:
    """A warning where the memory bandwidth of the run was often far below its best, or where the samples of its decode steps
    scatter: something else was using the machine."""
    bandwidth = results.bandwidth
    if bandwidth is not None and bandwidth.median < BUSY * bandwidth.best:
        share = bandwidth.median / bandwidth.best
        return f"Busy machine: memory bandwidth typically {100 * share:.0f} % of its best. Measure again."
    times = [stats.summary(cell.samples) for cell in results.cells if cell.kind == "decode"]
    if times and (most := max(time.count for time in times)) < stats.ENOUGH:
        return f"Too few samples to tell a busy machine: at most {most} a cell. Take {stats.ENOUGH} or more."
    spread = statistics.median([time.p90 / time.p50 for time in times]) if times else 1.0
    if spread <= SPREAD:
        return None
    return f"Busy machine: p90 of a decode step is typically {spread:.2f} times its median. Measure again."


def busy_runs(results: Sequence[Results]) -> list[str]:
    """The warnings of several runs, each with the number of its run where there is more than one."""
    texts = [(number, busy(result)) for number, result in enumerate(results, 1)]
    return [f"Run {number}: {text}" if len(results) > 1 else text for number, text in texts if text]
