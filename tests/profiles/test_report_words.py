"""What the report says in words, and with how many digits."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from exporter.units import size
from profiles.report import render
from profiles.report_data import rows_of, slope_of
from profiles.report_words import headlines, sentences, tiles
from profiles.results import Arithmetic
from profiles.units import milliseconds, rounded


def test_the_headline_is_computed(results, page, parsed):
    (found,) = headlines(rows_of([results])).values()
    assert (found.few.groups, found.many.groups, found.few.series) == ("1", "9", "grouped")
    assert found.few.cell.context == 4096
    ratio = found.many.times.p50 / found.few.times.p50
    text = " ".join(parsed(page).text)
    assert f"{ratio:.2f} times as fast" in text
    assert (tiles(rows_of([results]))[1].value, ratio > 1.5) == (f"{ratio:.2f}×", True)
    floors = [row.ratio for row in found.fastest]
    assert f"takes {min(floors):.2f} to {max(floors):.2f} times what reading its weights" in text
    assert min(floors) < max(floors)
    assert f"{milliseconds(found.few.times.p50)} ms" in text
    assert "15.4 kB a token rather than 138 kB" in text
    assert "loss goes from 2.59 to 4.61" in text


def test_each_model_has_its_own_headline(factory):
    """A bundle and what was converted from it are two models: neither is left out, and none is called the only one."""
    cells = [factory.cell(factory.subject(g, model=m), context=64) for g, m in ((9, "mha"), (3, "mha-gqa3"))]
    rows = rows_of([factory.sweep(cells=tuple(cells))])
    assert [tile.what.split("with ")[1] for tile in tiles(rows)] == [
        "9 KV heads (grouped · mha)",
        "3 KV heads (grouped · mha-gqa3)",
    ]
    said = sentences(rows)
    assert [text.split(":")[0] for text in said] == ["mha", "mha", "mha-gqa3", "mha-gqa3"]
    assert said[2].startswith("mha-gqa3: With 3 KV heads a decode step takes")
    assert not [text for text in sentences(rows_of([factory.sweep()])) if text.startswith("SmolLM2")]


@pytest.mark.parametrize(
    ("before", "after", "texts"),
    [
        (5.6906563, 5.6982174, ("5.69066", "5.69822", "+0.00756")),
        (2.59, 4.61, ("2.59", "4.61", "+2.02")),
        (1234.4, 2345.6, ("1234", "2346", "+1112")),
        (2.5, 2.5, ("2.50", "2.50", "+0.00")),
        (2.5, 2.5 + 1e-14, ("2.500000", "2.500000", "+0.000000")),
    ],
)
def test_a_change_of_quality_does_not_contradict_itself(factory, before, after, texts):
    qualities = ((9, {"loss": before}), (1, {"loss": after}))
    cells = tuple(factory.cell(factory.subject(g), quality=q) for g, q in qualities)
    rows = rows_of([factory.sweep(cells=cells)])
    first, last, change = texts
    assert (tiles(rows)[-1].value, tiles(rows)[-1].what) == (change, f"loss: {first} to {last}")
    assert sentences(rows)[-1] == f"Quality: loss goes from {first} to {last}."


def test_noise_is_named(factory, parsed):
    what = [factory.subject(g) for g in (9, 1)]
    samples = tuple(0.01 + 0.02 * (i % 3) for i in range(12))
    cells = tuple(factory.cell(w, context=c, samples=s) for w in what for c, s in ((128, (0.5, 0.6) * 3), (1024, samples)))
    busy = factory.sweep(cells=cells, bandwidth=dataclasses.replace(factory.BANDWIDTH, samples=(30e9, 12e9, 15e9)))
    text = " ".join(parsed(render([busy])).text)
    assert "so it may be no change at all" in text
    assert "More context cost nothing measurable (grouped)." in text
    assert "Busy" not in render([factory.sweep()])
    assert text.index("memory bandwidth typically 50 % of its best") < text.index("headpool report", 300)
    two = " ".join(parsed(render([busy, factory.sweep()])).text)
    assert "Run 1: Busy machine" in two
    assert "Run 2: Busy" not in two


def test_slopes_have_the_digits_that_were_measured(factory):
    """The same true slope, with little noise and with much: its digits go, and then its very claim."""

    def sentence(noise, factors):
        rng = np.random.default_rng(1)
        cells = [
            factory.cell(
                factory.subject(g),
                context=context,
                burst=1,
                samples=tuple(0.02 + factor * context * 1e-6 + noise * abs(rng.standard_normal()) for _ in range(64)),
            )
            for g, factor in zip((9, 1), factors, strict=True)
            for context in (128, 1024, 4096)
        ]
        (found,) = [text for text in sentences(rows_of([factory.sweep(cells=tuple(cells))])) if "1,000 tokens" in text]
        return found

    assert "cost 1.23 ms with 1 KV head and 4.57 ms with 9 KV heads (grouped)." in sentence(1e-6, (4.567, 1.234))
    assert re.search(r"cost 1\.\d ms with 1 KV head and 4\.\d ms with 9 KV heads \(grouped\)\.", sentence(2e-3, (4.567, 1.234)))
    assert sentence(2e-4, (1.2, 1.2)).endswith("(grouped), a difference within the noise.")
    assert "nothing measurable with 9 KV heads" in sentence(0.03, (1.2, 1.2))


def test_a_slope_stands_beside_the_larger_of_memorys_and_arithmetics(factory):
    """With 9 KV heads memory bounds a token of context, with 1 the arithmetic, which is the same for both."""
    operations = 150_000
    cells = [
        factory.cell(factory.subject(g, attention_operations=operations), context=context, median=0.02 + context * per_token)
        for g, per_token in ((9, 8e-6), (1, 2e-6))
        for context in (1000, 2000, 3000)
    ]
    arithmetic = Arithmetic(2, (90e9, 100e9))
    results = factory.sweep(cells=tuple(cells), arithmetic=arithmetic)
    rows = rows_of([results])
    bytes_9 = cells[0].subject.kv_bytes_per_token
    floors = {row.groups: row.token_floor for row in rows}
    assert floors == pytest.approx({"9": bytes_9 / 31e9, "1": operations / 100e9})
    assert bytes_9 / 9 / 31e9 < operations / 100e9 < bytes_9 / 31e9  # each bounds one of them
    found = slope_of([row for row in rows if row.groups == "1"])
    assert found is not None
    assert float(found.ratio) == pytest.approx(found.value / (operations / 100e9 * 1e6), rel=0.05)  # it is rounded
    page = render([results])
    assert f"{found.ratio} times the least it can" in page
    assert "100 billion float32 operations" in page
    without = rows_of([dataclasses.replace(results, arithmetic=None)])
    assert {row.token_floor for row in without} == {None}  # memory's alone might be too low


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((1.689, 1.65, 1.73), "1.69"),
        ((123.4, 100, 150), "120"),
        ((1.689, 1.689, 1.689), "1.69"),
        ((0.4, -1, 2), "0.4"),
        ((0, 0, 0), "0.00"),
        ((1234.5, 1234, 1235), "1,230"),
    ],
)
def test_digits(interval, text):
    assert rounded(*interval) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (15_360, "15.4 kB"), (999_900, "1 MB"), (1.5e13, "15 TB")]
)
def test_sizes_are_decimal(count, text):
    assert size(count) == text


def test_the_context_of_an_encoder_decoder_is_explained(factory):
    words = "context is the tokens that the encoder reads"
    assert words not in " ".join(sentences(rows_of([factory.sweep()])))
    cells = (factory.cell(factory.subject(encoder=True)),)
    assert words in " ".join(sentences(rows_of([factory.sweep(cells=cells)])))
