from __future__ import annotations

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

from exporter.errors import UserError
from profiles import noise
from profiles.benchmarks import readme
from profiles.compare import compare, comparison_table, comparison_view
from profiles.results import Results
from profiles.table import results_table, results_view


def scaled(results, factor, **changes):
    cells = [dataclasses.replace(c, samples=tuple(s * factor for s in c.samples)) for c in results.cells]
    return dataclasses.replace(results, cells=tuple(cells), **changes)


def text_of(table, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_equal_runs_pass_and_slower_runs_fail(factory):
    a = factory.sweep(groups=(9, 1), patterns=("grouped",))
    same = compare(a, a)
    assert len(same.pairs) == len(a.cells)
    assert {pair.verdict for pair in same.pairs} == {"same"}
    assert not same.failures(1.05)
    assert not same.warnings
    slower = compare(a, scaled(a, 1.2))
    assert len(slower.failures(1.05)) == len(a.cells)
    assert all(pair.ratio == pytest.approx(1.2) and pair.low < 1.2 < pair.high for pair in slower.pairs)
    assert not slower.failures(1.25)
    faster = compare(a, scaled(a, 0.5))
    assert {pair.verdict for pair in faster.pairs} == {"faster"}


def test_a_difference_within_the_noise_does_not_fail(factory):
    what = factory.subject()
    a = factory.sweep(cells=(factory.cell(what, samples=(1.0, 2.0, 3.0, 1.5, 2.5, 2.1)),))
    b = factory.sweep(cells=(factory.cell(what, samples=(1.2, 2.3, 3.4, 1.6, 2.7, 2.2)),))
    (pair,) = compare(a, b).pairs
    assert pair.ratio > 1.05
    assert pair.verdict == "same"
    assert not compare(a, b).failures(1.05)


def test_few_samples_have_no_verdict(factory):
    whats = (factory.subject(9), factory.subject(1))
    a, b = (factory.sweep(cells=tuple(factory.cell(what, samples=(t,) * 5) for what in whats)) for t in (0.1, 0.2))
    comparison = compare(a, b)
    assert {pair.verdict for pair in comparison.pairs} == {"few samples"}
    assert not comparison.failures(1.05)
    shown = text_of(comparison_table(comparison, 1.05))
    assert shown.count("few samples") == 2
    assert "inf" not in shown
    shown = text_of(comparison_view(comparison, 1.05))
    assert "Too few samples to tell a busy machine: at most 5 a cell. Take 6 or more." in shown
    assert "few samples" in text_of(results_table(a))


def test_matching_is_by_what_was_measured(factory):
    a = factory.sweep(groups=(9, 3), patterns=("grouped", "gqa"), contexts=(128,))
    b = factory.sweep(groups=(3, 1), patterns=("grouped",), contexts=(128, 256))
    found = compare(a, b)
    assert len(found.pairs) == 3  # G=3, grouped, 128 tokens, three kinds
    assert (found.only_a, found.only_b) == (9, 9)
    with pytest.raises(UserError, match="no cell in common"):
        compare(a, factory.sweep(groups=(1,), patterns=("repeat",)))
    words = "the second file holds 2 cells of 9 KV heads, grouped, static, fp32, batch 1, 128 tokens, decode; measure"
    with pytest.raises(UserError, match=words):
        compare(a, dataclasses.replace(a, cells=a.cells * 2))
    with pytest.raises(UserError, match="--fail-above 0 is not a positive ratio"):
        found.failures(0)


def test_warnings_name_what_differs(factory):
    a = factory.sweep()
    b = scaled(a, 1, machine=dataclasses.replace(a.machine, cpu="Other CPU"))
    assert compare(a, b).warnings == ("different CPU: Test CPU 9000 and Other CPU",)


def test_tables_fit_a_terminal_and_mark_failures(factory):
    a = factory.sweep(groups=(9, 1), patterns=("grouped",), contexts=(128,))
    shown = text_of(comparison_table(compare(a, scaled(a, 1.3)), fail_above=1.05))
    assert shown.count("slower than 1.05×") == len(a.cells)
    decode = dataclasses.replace(a, cells=tuple(c for c in a.cells if c.kind == "decode"))
    narrow = text_of(results_table(decode), 80)
    assert "…" not in narrow
    assert "SmolLM2-135M · onnxruntime · static · fp32 · decode · batch 1" in narrow
    assert "138 kB" in narrow
    [heading] = [line.split() for line in narrow.splitlines() if "pattern" in line]
    assert " ".join(heading) == "KV heads pattern context p50 ms p90 ms max ms × floor KV speed-up"


def test_speed_up_is_against_the_most_heads(factory):
    cells = [factory.cell(factory.subject(g), samples=(t,) * 6, floor=0.05) for g, t in ((9, 0.3), (1, 0.1))]
    lines = text_of(results_table(factory.sweep(cells=tuple(cells)))).splitlines()
    (one,) = [line.split() for line in lines if line.split()[:2] == ["1", "grouped"]]
    assert one[2:] == ["1,024", "100.0", "100.0", "100.0", "2.00", "15.4", "kB", "3.00"]


def test_a_speed_up_within_the_noise_is_none(factory):
    noisy = tuple(0.1 + 0.05 * np.random.default_rng(0).random(32))
    cells = [factory.cell(factory.subject(g), samples=s) for g, s in ((9, noisy), (1, tuple(0.99 * x for x in noisy)))]
    lines = text_of(results_table(factory.sweep(cells=tuple(cells)))).splitlines()
    (one,) = [line.split() for line in lines if line.split()[:2] == ["1", "grouped"]]
    assert one[-2:] == ["≈", "1"]


def test_p99_needs_a_hundred_samples(factory):
    few, many = (factory.cell(factory.subject(g), samples=(0.1,) * n) for g, n in ((9, 99), (1, 100)))
    shown = text_of(results_table(factory.sweep(cells=(few,))))
    assert "max ms" in shown
    assert "p99" not in shown
    shown = text_of(results_table(factory.sweep(cells=(many,))))
    assert "p99 ms" in shown
    assert "max" not in shown
    both = text_of(results_table(factory.sweep(cells=(few, many))))
    assert "p99 ms max ms" in " ".join(both.split())


def test_a_busy_machine_is_named_above_the_tables(factory):
    quiet = factory.sweep(groups=(9, 1), patterns=("grouped",), contexts=(128,))
    busy = dataclasses.replace(quiet, bandwidth=dataclasses.replace(quiet.bandwidth, samples=(30e9, 12e9, 15e9)))
    words = "Busy machine: memory bandwidth typically 50 % of its best. Measure again."
    assert text_of(results_view(busy)).startswith(f"! {words}")
    assert "Busy" not in text_of(results_view(quiet))
    assert text_of(comparison_view(compare(quiet, busy))).startswith(f"! b: {words}")
    assert text_of(comparison_view(compare(busy, quiet))).startswith(f"! a: {words}")
    assert "Busy" not in text_of(comparison_view(compare(quiet, quiet)))


def test_steps_that_scatter_are_a_busy_machine(factory):
    """Where everything is slow all the time the bandwidth's median is its best, and only the scatter shows."""
    calm, wild = (0.1,) * 7 + (0.11,), (0.1,) * 6 + (0.4, 0.5)

    def shown(*cells):
        found = [factory.cell(factory.subject(g), samples=samples) for g, samples in zip((9, 3, 1), cells, strict=True)]
        return text_of(results_view(factory.sweep(cells=tuple(found), machine=loaded, bandwidth=None)))

    loaded = dataclasses.replace(factory.MACHINE, load=9.0)
    assert shown(wild, wild, calm).startswith("! Busy machine: p90 of a decode step is typically 4.30 times its median.")
    assert "Busy" not in shown(calm, calm, wild)  # one hiccup is no busy machine, nor is the load of an export before
    prefill = factory.cell(factory.subject(), "prefill", samples=wild)
    assert "Busy" not in text_of(results_view(factory.sweep(cells=(prefill,))))


def test_the_committed_runs_are_quiet():
    for path in readme.FOLDER.glob("smollm2*.json"):
        assert noise.busy(Results.load(path)) is None


def test_quality_stands_under_the_table(factory):
    a = factory.sweep(contexts=(128,))
    lines = text_of(results_view(a)).splitlines()
    assert [line.rstrip() for line in lines[-3:]] == [
        "quality, G = 9: loss 2.590, agreement 1.000",
        "quality, G = 3: loss 2.600, agreement 0.7000",
        "quality, G = 1: loss 4.610, agreement 0.6000",
    ]
    assert "quality" not in text_of(results_view(dataclasses.replace(a, cells=(factory.cell(factory.subject()),))))
    nats = factory.cell(factory.subject(), quality={"cross-entropy, nats a token": 5.69})
    assert text_of(results_view(factory.sweep(cells=(nats,)))).endswith("cross-entropy 5.690 nats a token\n")


def test_only_what_took_turns_is_compared_without_a_mark(factory):
    def sweep(cohort):
        cells = [factory.cell(factory.subject(g), samples=(t,) * 8, cohort=c) for g, t, c in ((9, 0.3, 0), (1, 0.1, cohort))]
        return factory.sweep(cells=tuple(cells))

    apart, together = text_of(results_table(sweep(1))), text_of(results_table(sweep(0)))
    assert "3.00 *" in apart
    assert "*: not measured in turns" in " ".join(apart.split())
    assert "*" not in together
    assert text_of(comparison_table(compare(sweep(0), sweep(1)))).count("1.000–1.000 *") == 1
    shown = " ".join(text_of(comparison_table(compare(sweep(0), sweep(1)))).split())
    assert "*: measured beside other graphs in b than in a" in shown
    assert "*" not in text_of(comparison_table(compare(sweep(1), sweep(1))))


def test_a_row_without_peers_has_no_speed_up(factory):
    cells = [factory.cell(factory.subject(g, model=m), samples=(0.1,), floor=0.05) for g, m in ((9, "mha"), (3, "gqa3"))]
    lines = text_of(results_table(factory.sweep(cells=tuple(cells)))).splitlines()
    assert [line.split()[-1] for line in lines if "grouped" in line] == ["kB", "kB"]


def test_eighty_columns_break_no_figure(factory):
    a = factory.sweep(groups=(9, 1), contexts=(128,))
    long = tuple(dataclasses.replace(c, samples=c.samples * 3) if c.kind == "decode" else c for c in a.cells)  # p99 and max
    a = dataclasses.replace(a, cells=long)
    for table in (results_table(a), comparison_table(compare(a, a), fail_above=1.05)):
        rows = [line for line in text_of(table, 80).splitlines() if re.search(r"\b128\b", line)]
        assert len(rows) == len(a.cells)
        assert all(re.match(r" *\d (grouped|gqa|repeat) +(decode|prefill|ttft) ", re.sub(" +", " ", row)) for row in rows)
        body = re.split(r" *─+ *\n", text_of(table, 80))[1]
        assert len(re.split(r"\n *\n", body)[0].splitlines()) == len(a.cells)  # none goes over two lines
    assert len(re.findall(r"\d\.\d{3}–\d\.\d{3} ", text_of(comparison_table(compare(a, a)), 80))) == len(a.cells)
    slower = text_of(comparison_table(compare(a, scaled(a, 1.3)), fail_above=1.05), 80)  # the verdict is what breaks
    assert len(re.findall(r"\d+\.\d+ +\d+\.\d+ +1\.300 +1\.\d{3}–1\.\d{3} +slower", slower)) == len(a.cells)


def test_the_footer_says_only_what_there_is(factory):
    a = factory.sweep(groups=(9, 3), patterns=("grouped",), contexts=(128,))
    b = factory.sweep(groups=(3,), patterns=("grouped",), contexts=(128,))
    assert "partner" not in text_of(comparison_table(compare(a, a)))
    assert "without a partner: 3 of a\n" in re.sub(" +\n", "\n", text_of(comparison_table(compare(a, b))))
    assert "without a partner: 3 of b\n" in re.sub(" +\n", "\n", text_of(comparison_table(compare(b, a))))


def test_a_speed_up_that_nothing_has_is_no_column(factory):
    alone = factory.sweep(cells=(factory.cell(factory.subject()),))
    assert "speed-up" not in text_of(results_table(alone))
    assert "speed-up" in text_of(results_table(factory.sweep()))


def test_the_context_of_an_encoder_decoder_is_explained(factory):
    words = "context of an encoder-decoder: the tokens of its input"
    for encoder in (True, False):
        cells = (factory.cell(factory.subject(encoder=encoder)),)
        shown = " ".join(text_of(results_table(factory.sweep(cells=cells))).split())
        assert (words in shown) == encoder
