from __future__ import annotations

import gc

import numpy as np
import pytest

from exporter.errors import UserError
from profiles import stats
from profiles.bandwidth import BandwidthProbe, floor_seconds
from profiles.machine import fingerprint, l3_bytes
from profiles.measure import Plan, cohorts, measure, random_tokens


def run(factory, fakes, plan, steps=(0.01, 0.02), growth=0.0, **options):
    clock, log = fakes.Clock(), []
    names = [f"s{index}" for index in range(len(steps))]
    subjects = []
    for index, (name, step) in enumerate(zip(names, steps, strict=True)):
        subject = factory.subject(9 - 2 * index, variant=name, weight_bytes=1000, kv_bytes_per_token=10)
        subjects.append((subject, fakes.opener(name, clock, log, step, growth)))
    return measure(subjects, plan, clock=clock, **options), log


def test_turns_are_bursts_whose_order_reverses_every_round(factory, fakes):
    plan = Plan(contexts=(16,), kinds=("decode",), samples=8, burst=2, settle=1, warmup=3)
    cells, log = run(factory, fakes, plan)
    steps = [name for name, what in log if isinstance(what, int)]
    warmup = ["s0"] * 3 + ["s1"] * 3
    a, b = ["s0"] * 3, ["s1"] * 3  # one untimed step and two samples
    assert steps == warmup + a + b + b + a + a + b + b + a
    assert [len(cell.samples) for cell in cells] == [8, 8]
    assert {what for _, what in log if isinstance(what, int)} == {16}  # every step sees exactly the context
    assert [what for _, what in log if what in ("open", "close")] == ["open", "open", "close", "close"]


def test_samples_hold_the_step_and_nothing_else(factory, fakes):
    plan = Plan(contexts=(16, 32), batches=(1, 2), samples=9, burst=4, prefill_samples=3)
    cells, _ = run(factory, fakes, plan)
    assert len(cells) == 2 * 2 * 2 * 3
    for cell in cells:
        step = {"s0": 0.01, "s1": 0.02}[cell.subject.variant]
        wanted = {"decode": step, "prefill": step * cell.context, "ttft": step * cell.context + fakes.PICK}[cell.kind]
        assert cell.samples == pytest.approx([wanted] * (9 if cell.kind == "decode" else 3))
        assert cell.burst == (2 if cell.kind == "decode" else 1)  # a quarter of the samples at the most
        assert 1 <= cell.capacity - cell.context <= 8
    assert gc.isenabled()


def test_tokens_are_drawn_from_all_of_the_vocabulary(fakes):
    session = fakes.opener("s", fakes.Clock(), [])(batch=3, capacity=999)
    prompts, tokens = random_tokens(session, 900, seed=0)
    assert [len(prompt) for prompt in prompts] == [900] * 3
    assert len(tokens) == 3
    assert all(set(prompt) == set(range(fakes.CONFIG.vocab_size)) for prompt in prompts)
    assert not np.array_equal(prompts[0], prompts[1])


def test_drift_cancels_in_ratios(factory, fakes):
    plan = Plan(contexts=(16,), kinds=("decode",), samples=64, burst=4)
    (a, b), _ = run(factory, fakes, plan, steps=(0.01, 0.01), growth=0.01)
    assert max(a.samples) > 1.8 * min(a.samples)  # the machine slowed down a great deal
    assert stats.median(b.samples) / stats.median(a.samples) == pytest.approx(1, abs=0.01)


def test_time_limit_ends_between_rounds_and_keeps_counts_equal(factory, fakes):
    plan = Plan(contexts=(16,), kinds=("decode",), samples=1000, burst=2, seconds=30)
    seen = []
    cells, _ = run(factory, fakes, plan, progress=lambda done, total, what: seen.append((done, total, what)))
    counts = {len(cell.samples) for cell in cells}
    assert len(counts) == 1
    assert 4 <= counts.pop() < 100
    assert seen[0] == (2, 2000, "s0, 16 tokens, batch 1")


def test_probe_runs_before_amid_and_after(factory, fakes):
    marks, log = [], None
    plan = Plan(contexts=(16,), kinds=("decode",), samples=8, burst=2, settle=1, warmup=0)
    clock, log = fakes.Clock(), []
    subjects = [(factory.subject(), fakes.opener("s", clock, log))]
    measure(subjects, plan, clock=clock, probe=lambda: marks.append(sum(isinstance(what, int) for _, what in log)))
    assert marks == [0, 6, 12]


def test_sessions_are_closed_when_one_fails(factory, fakes):
    clock, log = fakes.Clock(), []

    def broken(*, batch, capacity, profile_to=None):
        raise UserError("no such runtime")

    subjects = [(factory.subject(), fakes.opener("s", clock, log)), (factory.subject(1), broken)]
    with pytest.raises(UserError, match="no such runtime"):
        measure(subjects, Plan(contexts=(8,)), clock=clock)
    assert log == [("s", "open"), ("s", "close")]
    assert gc.isenabled()


def test_cohorts_fit_into_memory(factory):
    subjects = [factory.subject(g, weight_bytes=100, kv_bytes_per_token=g) for g in (8, 4, 2, 1)]
    # 2 × 100 weights and 2 × 10 × G caches: 360, 280, 240, 220
    assert cohorts(subjects, 1, 10, 10_000) == [[0, 1, 2, 3]]
    assert cohorts(subjects, 1, 10, 640) == [[0, 1], [2, 3]]
    assert cohorts(subjects, 1, 10, 1) == [[0], [1], [2], [3]]
    assert cohorts(subjects, 2, 10, 640) == [[0], [1, 2], [3]]  # 520, 360, 280, 240


def test_cohorts_keep_a_pattern_together(factory):
    kinds = [(g, pattern) for g in (8, 4) for pattern in ("grouped", "gqa")]
    subjects = [factory.subject(*kind, weight_bytes=100, kv_bytes_per_token=0) for kind in kinds]
    assert cohorts(subjects, 1, 10, 400) == [[0, 2], [1, 3]]
    assert cohorts(subjects, 1, 10, 600) == [[0, 2], [1, 3]]  # one of the second would fit, not both
    assert cohorts(subjects, 1, 10, 200) == [[0], [2], [1], [3]]


def test_cells_name_their_cohort(factory, fakes):
    cells, log = run(factory, fakes, Plan(contexts=(16,), kinds=("decode",), samples=2, memory=1))
    assert [cell.cohort for cell in cells] == [0, 1]
    assert [name for name, what in log if what in ("open", "close")] == ["s0", "s0", "s1", "s1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": ()}, "contexts is empty"),
        ({"kinds": ("speed",)}, "kind 'speed' is not one of decode, prefill, ttft"),
        ({"samples": 0}, "samples 0 is not positive"),
        ({"contexts": (0,)}, "context 0 is not positive"),
        ({"batches": (0,)}, "batch 0 is not positive"),
        ({"capacity": 8}, "capacity 8 has no room for a token after 8 tokens"),
        ({"warmup": -1}, "warmup -1 is negative"),
        ({"settle": -1}, "settle -1 is negative"),
        ({"seconds": 0}, "seconds 0 is not a positive bound"),
    ],
)
def test_plan_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        Plan(**({"contexts": (8,)} | changes))


def test_floor_is_bytes_over_bandwidth(factory):
    what = factory.subject(weight_bytes=500, kv_bytes_per_token=3)
    cell = factory.cell(what, context=100, batch=2)
    assert floor_seconds(cell, 10.0) == (500 + 2 * 100 * 3) / 10
    assert floor_seconds(factory.cell(what, "prefill", 100), 10.0) is None
    assert floor_seconds(factory.cell(what, context=100, provider="CUDAExecutionProvider"), 10.0) is None


def test_bandwidth_probe_reads_the_whole_array(fakes):
    probe = BandwidthProbe(threads=2, array_bytes=8 << 20, repeats=2)
    assert sum(int(part.sum()) for part in probe._parts) == 1 << 20
    clock = iter([0.0, 1.0, 1.0, 3.0])
    assert probe(lambda: next(clock)) == float(8 << 20)
    assert probe.result().samples == (float(8 << 20), float(4 << 20))
    assert 1e8 < BandwidthProbe(threads=1, array_bytes=64 << 20)() < 1e13


def test_fingerprint_is_filled():
    machine = fingerprint()
    assert machine.cpu
    assert 1 <= machine.cores <= machine.cpus
    assert machine.memory_bytes > 1 << 28
    assert machine.l3_bytes == l3_bytes()
