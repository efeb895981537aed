"""Percentiles, bootstrap intervals and slopes. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Samples = Sequence[float]
# Fewer samples on a side, and there is no interval. Of two equal normal distributions (300 trials each) the bootstrap called
# different 29 % at 2 samples, 11 % at 3, 9 % at 4 and 2.7 % at 6: tests/profiles/test_stats.py counts again.
ENOUGH = 6
TAIL = 100  # samples, below which the 99th percentile would be little else than the largest


@dataclass(frozen=True)
class Summary:
    """Percentiles of samples, in the samples' unit. `p99` is None under TAIL samples: `max` is what they can say."""

    p10: float
    p50: float
    p90: float
    p99: float | None
    max: float
    count: int


def summary(samples: Samples) -> Summary:
    """Percentiles by linear interpolation between order statistics (NumPy's and R's default, type 7)."""
    p10, p50, p90, p99 = (float(value) for value in np.percentile(np.asarray(samples, dtype=float), [10, 50, 90, 99]))
    return Summary(p10, p50, p90, p99 if len(samples) >= TAIL else None, float(max(samples)), len(samples))


def median(samples: Samples) -> float:
    return float(np.median(np.asarray(samples, dtype=float)))


def medians(samples: Samples, resamples: int, rng: np.random.Generator, block: int = 1) -> np.ndarray:
    """Medians [resamples] of bootstrap resamples.

    Samples taken in one burst share what the machine did at that moment, so whole runs of `block` neighbours are drawn
    (moving-block bootstrap, Künsch 1989); with block 1 it is Efron's bootstrap. A block is at most a quarter of the samples:
    with one block there would be nothing to draw, and every resample would be the sample itself.
    """
    values = np.asarray(samples, dtype=float)
    block = max(1, min(block, len(values) // 4))
    count = -(-len(values) // block)
    starts = rng.integers(0, len(values) - block + 1, size=(resamples, count))
    index = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, : len(values)]
    return np.median(values[index], axis=1)


def median_interval(
    samples: Samples, level: float = 0.95, resamples: int = 4000, seed: int = 0, block: int = 1
) -> tuple[float, float]:
    """Percentile-bootstrap confidence interval of the median."""
    return interval(medians(samples, resamples, np.random.default_rng(seed), block), level)


def ratio_interval(
    above: Samples, below: Samples, level: float = 0.95, resamples: int = 4000, seed: int = 0, block: int = 1
) -> tuple[float, float]:
    """Percentile-bootstrap confidence interval of median(above) / median(below), the two resampled independently.

    (0, ∞) where either has fewer than ENOUGH samples: they tell nothing.
    """
    if min(len(above), len(below)) < ENOUGH:
        return 0.0, math.inf
    rng = np.random.default_rng(seed)
    return interval(medians(above, resamples, rng, block) / medians(below, resamples, rng, block), level)


def slope(contexts: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Milliseconds that each further 1,000 tokens of context cost, by least squares; None with fewer than two contexts."""
    if len(set(contexts)) < 2:
        return None
    return float(np.polyfit(np.asarray(contexts, dtype=float), np.asarray(seconds, dtype=float), 1)[0]) * 1e6


def slopes(
    contexts: Sequence[float], samples: Sequence[Samples], resamples: int = 4000, seed: int = 0, block: int = 1
) -> np.ndarray | None:
    """Slopes [resamples] as `slope` has them, of bootstrap resamples of each context's samples; None as there, and where one
    of them has fewer than ENOUGH samples."""
    if len(set(contexts)) < 2 or min(map(len, samples)) < ENOUGH:
        return None
    rng = np.random.default_rng(seed)
    seconds = np.stack([medians(part, resamples, rng, block) for part in samples])
    return np.asarray(np.polyfit(np.asarray(contexts, dtype=float), seconds, 1)[0] * 1e6)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """What lies between the tails of bootstrap values."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
