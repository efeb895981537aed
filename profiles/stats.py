"""Percentiles, bootstrap intervals and slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

Samples = Sequence[float]
# Fewer samples on a side, and there is no interval.
ENOUGH = 6
BURSTS = 4  # that the samples are at least cut into
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


def medians(samples: Samples, resamples: int, rng: np.random.Generator, block: int = 1, sides: int = 1) -> np.ndarray:
    """Medians [resamples] of bootstrap resamples, as far apart as a 95 % interval of something made of `sides` of them needs.

    Samples taken in one burst share what the machine did at that moment, so whole bursts of `block` neighbours are drawn
    (cluster bootstrap, Davison & Hinkley 1997, section 3.8); with block 1 it is Efron's bootstrap. A block is at most a
    quarter of the samples: with one block there would be nothing to draw, and every resample would be the sample itself.

    Of k blocks a resample's variance is too small by (k − 1)/k, and so few tell it badly: deviations from the samples' own
    median are widened by √(k/(k − 1)) and from the normal to Student's quantile with sides · (k − 1) degrees of freedom. Two
    equal distributions are then called different in 2 to 6 of a hundred cases (tests/profiles/test_stats.py counts again),
    without it in 11 to 14 at four bursts of eight.
    """
    values = np.asarray(samples, dtype=float)
    block = max(1, min(block, len(values) // BURSTS))
    count = -(-len(values) // block)
    starts = block * rng.integers(0, count, size=(resamples, count))
    index = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1) % len(values)
    drawn, own = np.median(values[index], axis=1), np.median(values)
    if count < 2:
        return np.asarray(drawn)
    wider = math.sqrt(count / (count - 1)) * stdtrit(sides * (count - 1), 0.975) / ndtri(0.975)
    return np.asarray(own + wider * (drawn - own))


def median_interval(
    samples: Samples, level: float = 0.95, resamples: int = 4000, seed: int = 0, block: int = 1
) -> tuple[float, float]:
    """Bootstrap confidence interval of the median, see `medians`."""
    return interval(medians(samples, resamples, np.random.default_rng(seed), block), level)


def ratio_interval(
    above: Samples, below: Samples, level: float = 0.95, resamples: int = 4000, seed: int = 0, block: int = 1
) -> tuple[float, float]:
    """Bootstrap confidence interval of median(above) / median(below), the two resampled independently.

    (0, ∞) where either has fewer than ENOUGH samples: they tell nothing.
    """
    if min(len(above), len(below)) < ENOUGH:
        return 0.0, math.inf
    rng = np.random.default_rng(seed)
    return interval(medians(above, resamples, rng, block, 2) / medians(below, resamples, rng, block, 2), level)


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
    seconds = np.stack([medians(part, resamples, rng, block, len(samples)) for part in samples])
    return np.asarray(np.polyfit(np.asarray(contexts, dtype=float), seconds, 1)[0] * 1e6)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """What lies between the tails of bootstrap values."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
