from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats as scipy_stats

from profiles import stats

RNG = np.random.default_rng(3)
SAMPLES = tuple(RNG.lognormal(-4, 0.3, 101))
OTHERS = tuple(RNG.lognormal(-3.8, 0.2, 80))


def test_percentiles_agree_with_scipy():
    found = stats.summary(SAMPLES)
    wanted = scipy_stats.mstats.mquantiles(SAMPLES, [0.1, 0.5, 0.9, 0.99], alphap=1, betap=1)
    assert (found.p10, found.p50, found.p90, found.p99) == pytest.approx(tuple(wanted))
    assert (found.max, found.count) == (max(SAMPLES), 101)


def test_under_a_hundred_samples_there_is_no_p99():
    assert stats.summary(SAMPLES[:99]).p99 is None
    assert stats.summary(SAMPLES[:100]).p99 is not None


# Resamples of ours and of scipy are drawn apart: the ends of their intervals differ by what so many leave open.
def test_median_interval_agrees_with_scipy():
    wanted = scipy_stats.bootstrap((SAMPLES,), np.median, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert stats.median_interval(SAMPLES, resamples=20000) == pytest.approx(tuple(wanted), rel=0.01)


def test_ratio_interval_agrees_with_scipy():
    def ratio(a, b, axis):
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    wanted = scipy_stats.bootstrap((OTHERS, SAMPLES), ratio, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert stats.ratio_interval(OTHERS, SAMPLES, resamples=20000) == pytest.approx(tuple(wanted), rel=0.015)


def test_level_widens_the_interval():
    narrow, wide = (stats.median_interval(SAMPLES, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_blocks_widen_the_interval_of_bursts():
    bursts = tuple(float(level) for level in RNG.normal(1, 0.1, 20) for _ in range(8))
    alone, together = (stats.median_interval(bursts, block=block) for block in (1, 8))
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_a_block_is_a_whole_burst():
    """Resamples of 0, 1, …, 23 in bursts of 6: four of them each, and the widening by hand."""
    values, block = tuple(float(value) for value in range(24)), 6
    bursts = np.random.default_rng(2).integers(0, 4, size=(50, 4))
    by_hand = [np.median(np.concatenate([values[6 * burst : 6 * burst + 6] for burst in row])) for row in bursts]
    wider = math.sqrt(4 / 3) * scipy_stats.t.ppf(0.975, 3) / scipy_stats.norm.ppf(0.975)
    wanted = 11.5 + wider * (np.array(by_hand) - 11.5)
    assert stats.medians(values, 50, np.random.default_rng(2), block) == pytest.approx(wanted)


@pytest.mark.parametrize(("count", "shared"), [(32, 0.0), (32, 0.5), (104, 0.8)])
def test_how_often_two_equal_distributions_differ(count, shared):
    """Bursts of 8; `shared` of the variance is a burst's own. 5 % of 300 are 15, with a standard deviation of 3.8."""

    def samples(rng):
        bursts = rng.normal(size=-(-count // 8)).repeat(8)[:count]
        return 10 + 0.3 * (math.sqrt(shared) * bursts + math.sqrt(1 - shared) * rng.normal(size=count))

    differ = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        low, high = stats.ratio_interval(samples(rng), samples(rng), resamples=200, block=8)
        differ += not low <= 1 <= high
    assert differ <= 24


def test_a_block_is_at_most_a_quarter_of_the_samples():
    wide, quarter = (stats.medians(SAMPLES, 200, np.random.default_rng(3), block) for block in (10**6, len(SAMPLES) // 4))
    assert np.array_equal(wide, quarter)
    assert len(set(wide)) > 1  # one block of all samples would give the same median every time


def test_few_samples_have_no_interval():
    few, enough = SAMPLES[: stats.ENOUGH - 1], SAMPLES[: stats.ENOUGH]
    assert stats.ratio_interval(few, enough) == stats.ratio_interval(enough, few) == (0, float("inf"))
    assert stats.ratio_interval(enough, enough)[1] < 2
    assert stats.slopes([1, 2], [few, enough]) is None
    rng = np.random.default_rng(4)
    intervals = [stats.ratio_interval(*rng.normal(10, 1, (2, stats.ENOUGH)), resamples=500) for _ in range(300)]
    assert sum(not low <= 1 <= high for low, high in intervals) <= 21  # 5 % are 15


def test_coverage_of_the_ratio_interval():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        low, high = stats.ratio_interval(1.1 * rng.lognormal(0, 0.1, 40), rng.lognormal(0, 0.1, 40), resamples=500, seed=seed)
        hits += low <= 1.1 <= high
    assert hits >= 180  # 190 are expected, of a binomial with a standard deviation of 3


def test_slope_agrees_with_scipy():
    contexts, seconds = [128, 1024, 4096, 8192], [0.010, 0.0112, 0.0149, 0.0201]
    assert stats.slope(contexts, seconds) == pytest.approx(scipy_stats.linregress(contexts, seconds).slope * 1e6)
    assert stats.slope([64, 64], [1.0, 2.0]) is None


def test_slopes_agree_with_resampling_by_hand():
    contexts, rng = [128, 1024, 4096], np.random.default_rng(5)
    samples = [0.01 + context * 2e-6 + 0.001 * rng.standard_normal(64) for context in contexts]
    low, high = stats.interval(stats.slopes(contexts, samples))
    by_hand = []
    for _ in range(2000):
        medians = [np.median(rng.choice(part, len(part))) for part in samples]
        by_hand.append(scipy_stats.linregress(contexts, medians).slope * 1e6)
    assert (low, high) == pytest.approx(tuple(np.percentile(by_hand, [2.5, 97.5])), abs=0.03)
    assert low < 2 < high
    assert stats.slopes([64, 64], [[1.0], [2.0]]) is None


def test_one_sample_is_enough():
    assert stats.summary([0.5]).max == 0.5
