from __future__ import annotations

import dataclasses
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from exporter.errors import UserError
from exporter.units import size
from profiles import stats
from profiles.report import render, write_report
from profiles.report_data import rows_of, slope_of
from profiles.report_figures import Styles, latency_by_groups
from profiles.report_svg import nice_axis
from profiles.report_words import headlines, sentences, tiles
from profiles.results import Arithmetic
from profiles.units import milliseconds, rounded

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"


class Page(HTMLParser):
    """Checks that tags balance and collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def results(factory):
    return factory.sweep()


@pytest.fixture(scope="module")
def page(results):
    return render([results])


def test_the_page_is_balanced_and_whole(page):
    found = Page(page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Latency by KV heads",
        "Latency by context",
        "KV memory",
        "Distance from the floor",
        "Quality",
        "Where the time goes",
        "Time to first token",
        "Prefill",
        "How it was measured",
    ]
    assert found.tags.count("details") == len(headings)  # a table behind each figure, and one of the graphs
    assert page.count("prefers-color-scheme:dark") >= 2


def test_nothing_is_fetched_and_nothing_runs(page):
    found = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"} & set(found.tags)
    assert not re.search(r"https?://|//[a-z]|url\(|@import|@font-face|src=|href=|javascript:", page)
    assert "default-src 'none'" in page


def test_every_number_of_the_table_is_on_the_page(results, page):
    cells = set(re.findall(r"<td class=\"n?\">(.*?)</td>", page))
    for cell in results.cells:
        times = stats.summary(cell.samples)
        assert {milliseconds(value) for value in (times.p10, times.p50, times.p90, times.max)} <= cells
        assert size(cell.subject.kv_bytes_per_token) in cells
        if cell.floor:
            assert {milliseconds(cell.floor), f"{times.p50 / cell.floor:.2f}"} <= cells
        for value in (cell.breakdown or {}).values():
            assert milliseconds(value) in cells
        assert f"{cell.quality['loss']:.4g}" in cells


def test_the_headline_is_computed(results, page):
    (found,) = headlines(rows_of([results])).values()
    assert (found.few.groups, found.many.groups, found.few.series) == ("1", "9", "grouped")
    assert found.few.cell.context == 4096
    ratio = found.many.times.p50 / found.few.times.p50
    text = " ".join(Page(page).text)
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


def test_graphs_measured_apart_are_called_so(factory):
    def page(cohort):
        cells = [factory.cell(factory.subject(g), cohort=c, median=0.02 + g / 1e3) for g, c in ((9, 0), (1, cohort))]
        return " ".join(Page(render([factory.sweep(cells=tuple(cells))])).text)

    apart, together = page(1), page(0)
    for words in (
        "The two were not measured in turns",
        "with 9 KV heads, measured apart",
        "The graphs of one cohort are alive",
    ):
        assert words in apart
        assert words not in together
    assert "All graphs of one batch and context are alive at once" in together
    assert "All graphs" not in apart


def test_a_single_floor_is_a_tick_and_its_label_stays_beside_it(factory):
    page = render([factory.sweep(cells=(factory.cell(factory.subject(), floor=0.01),))])
    charts = re.findall(r'<g class="muted">(.*?)</g>', page)
    assert len(charts) == 2  # milliseconds, and × floor
    assert all('d="M-8 0h16"' in chart for chart in charts)
    floor, median = re.findall(r'class="label muted"[^>]* y="([\d.]+)"', page), re.findall(r'<svg x="[^"]*" y="([\d.]+)"', page)
    assert [float(y) - 4 for y in floor] == [float(y) for y in median]
    ratios = (("gqa", 1.2), ("grouped", 1.1), ("repeat", 1.3), ("attention", 6.0))
    cells = [
        factory.cell(factory.subject(g, pattern), samples=(0.01 * over,), floor=0.01)
        for pattern, over in ratios
        for g in (9, 1)
    ]
    many = render([factory.sweep(cells=tuple(cells))])
    (section,) = re.findall(r'<section id="floor">.*?</section>', many, re.S)
    line = float(re.search(r'<g class="muted"><line [^>]*y1="([\d.]+)"', section)[1])
    labels = {name: float(y) for y, name in re.findall(r'class="label [^"]*"[^>]* y="([\d.]+)"[^>]*>(\w+)<', section)}
    assert labels["floor"] == pytest.approx(line + 4, abs=0.1)
    rows = sorted(labels.values())
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(rows))


def test_settings_are_of_what_was_measured(factory):
    settings = {"batches": [1], "samples": 8, "prefill_samples": 5}
    facts = {}
    for kind in ("decode", "prefill"):
        page = render([factory.sweep(cells=(factory.cell(factory.subject(), kind),), settings=settings)])
        facts[kind] = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["decode"]["Batch"] == "1 sequence"
    assert facts["decode"]["Decode"] == "8 samples a cell"
    assert "Prefill" not in facts["decode"]
    assert facts["prefill"]["Prefill"] == "5 samples a cell"
    assert "Decode" not in facts["prefill"]


def test_noise_is_named(factory):
    what = [factory.subject(g) for g in (9, 1)]
    samples = tuple(0.01 + 0.02 * (i % 3) for i in range(12))
    cells = tuple(factory.cell(w, context=c, samples=s) for w in what for c, s in ((128, (0.5, 0.6) * 3), (1024, samples)))
    busy = factory.sweep(cells=cells, bandwidth=dataclasses.replace(factory.BANDWIDTH, samples=(30e9, 12e9, 15e9)))
    text = " ".join(Page(render([busy])).text)
    assert "so it may be no change at all" in text
    assert "More context cost nothing measurable (grouped)." in text
    assert "Busy" not in render([factory.sweep()])
    assert text.index("memory bandwidth typically 50 % of its best") < text.index("headpool report", 300)
    two = " ".join(Page(render([busy, factory.sweep()])).text)
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


def test_p99_is_shown_from_a_hundred_samples_on(factory):
    many = tuple(0.01 + 1e-5 * index for index in range(100))
    page = render([factory.sweep(cells=(factory.cell(factory.subject(9)), factory.cell(factory.subject(1), samples=many)))])
    assert {"p99 ms", "max ms"} <= set(re.findall("<th[^>]*>(.*?)</th>", page))
    page = render([factory.sweep(cells=(factory.cell(factory.subject(1), samples=many),))])
    assert "max ms" not in page
    assert '<td class="n">11.0</td>' in page


def test_settings_are_words(factory):
    settings = {
        "contexts": [128, 4096],
        "kinds": ["decode", "ttft"],
        "seconds": 10.0,
        "capacity": None,
        "memory": 12_000_000_000,
    }
    versions = {"headpool": "0.1.0", "torch": "2.13.0", "commit": "ab" * 20, "tree": "dirty"}
    page = render([factory.sweep(settings=settings | {"own_thing": {"a": True}}, versions=versions)])
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Contexts"] == "128, 4,096 tokens"
    assert facts["Measured"] == "decode step, time to first token"
    assert facts["Time limit"] == "10 s of a cell&#39;s samples"
    assert facts["Memory limit"] == "12 GB"
    assert facts["Own thing"] == "a: yes"
    assert facts["Commit"] == "abababababab, with changes not committed"
    assert facts["Read bandwidth"] == "31.0 GB/s at best (median 30.0, worst 29.0, of 3), reading 1.07 GB with 2 threads"
    assert "Cache" not in facts
    assert not re.search(r"[\[{'\]}]", " ".join(facts.values()).replace("&#39;", ""))


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


def test_hostile_strings_are_text(factory):
    what = factory.subject(9, HOSTILE, model=HOSTILE, bundle=HOSTILE, variant=HOSTILE, cache=HOSTILE, dtype=HOSTILE)
    what = dataclasses.replace(what, bundle_hash=HOSTILE, conversion={"method": HOSTILE})
    cells = [
        factory.cell(w, context=context, quality={HOSTILE: 1.0}, backend=HOSTILE, provider=HOSTILE, versions={HOSTILE: HOSTILE},
                     options={HOSTILE: HOSTILE}, breakdown={"attention": 0.01})
        for w in (what, dataclasses.replace(what, groups=1))
        for context in (8, 16)
    ]  # fmt: skip
    machine = dataclasses.replace(factory.MACHINE, cpu=HOSTILE, os=HOSTILE, gpus=(HOSTILE,), flags=(HOSTILE,))
    odd = factory.sweep(cells=tuple(cells), machine=machine, created=HOSTILE, notes=(HOSTILE,), settings={HOSTILE: HOSTILE})
    page = render([odd])
    found = Page(page)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page  # text of the data is never taken for a template


def test_two_runs_of_one_thing_are_told_apart(factory):
    a, b = factory.sweep(contexts=(128,)), factory.sweep(contexts=(128,))
    series = {row.series for row in rows_of([a, b])}
    assert series == {f"{pattern} · run {run}" for pattern in ("grouped", "gqa", "repeat") for run in (1, 2)}
    assert Page(render([a, b])).text.count("Run 2, 2026-11-22T01:00:00+00:00") == 1


def test_machines_are_told_apart(factory):
    """Else a line, and its slope, would go from a context on one to a context on the other."""
    other = dataclasses.replace(factory.MACHINE, cpu="Other CPU", cpus=8)
    runs = [
        factory.sweep(contexts=(128,)),
        factory.sweep(contexts=(4096,), machine=other),
        factory.sweep(contexts=(1024,), machine=other, settings={"threads": 1}),
    ]
    series = {row.series for row in rows_of(runs) if row.subject.pattern == "gqa"}
    places = ("Test CPU 9000, 2 CPUs, all threads", "Other CPU, 8 CPUs, all threads", "Other CPU, 8 CPUs, 1 threads")
    assert series == {f"gqa · {place}" for place in places}


def test_what_differs_names_the_series(factory):
    cells = [factory.cell(factory.subject(g, cache=cache)) for g in (9, 1) for cache in ("static", "concat")]
    assert {row.series for row in rows_of([factory.sweep(cells=tuple(cells))])} == {"grouped · static", "grouped · concat"}


def test_small_and_odd_results_still_make_a_page(factory):
    one = factory.cell(factory.subject(), samples=(0.01,), floor=None)
    prefill = factory.cell(factory.subject((9, 3, 1)), "prefill", samples=(2.0,))
    for cells in ((one,), (prefill,), (one, prefill), (dataclasses.replace(one, samples=(1e-12,)),)):
        Page(render([factory.sweep(cells=cells, bandwidth=None)]))
    huge = factory.subject(1, weight_bytes=2**62, kv_bytes_per_token=2**62)
    Page(render([factory.sweep(cells=(factory.cell(huge, context=2**60, samples=(9e8,), floor=1e-9),))]))
    zero = factory.subject(1, weight_bytes=0, kv_bytes_per_token=0)
    Page(render([factory.sweep(cells=(factory.cell(zero, floor=None),))]))
    with pytest.raises(UserError, match="hold no cells"):
        render([factory.sweep(cells=())])


def test_an_output_that_exists_is_refused(results, tmp_path):
    path = write_report([results], tmp_path / "r.html")
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(UserError, match="exists; choose another name"):
        write_report([results], path)


@pytest.mark.parametrize("values", [[0.0], [1e-9], [3.0, 97.0], [1.0, 1.0], [1e12], [0.2, 0.21], [128, 4096, 100_000]])
@pytest.mark.parametrize("zero", [True, False])
def test_axes_cover_their_values_with_a_few_ticks(values, zero):
    axis = nice_axis("ms", values, zero)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_runs_of_one_machine_share_a_floor(factory):
    slow, fast = (dataclasses.replace(factory.BANDWIDTH, samples=(best,)) for best in (10e9, 20e9))
    cells = (factory.cell(factory.subject(), floor=0.01),)
    runs = [factory.sweep(cells=cells, bandwidth=bandwidth) for bandwidth in (slow, fast)]
    assert [row.cell.floor for row in rows_of(runs)] == pytest.approx([0.005, 0.01])
    assert [row.cell.floor for row in rows_of(runs[:1])] == [0.01]
    elsewhere = dataclasses.replace(runs[1], machine=dataclasses.replace(runs[1].machine, cpu="another"))
    assert [row.cell.floor for row in rows_of([runs[0], elsewhere])] == [0.01, 0.01]


def test_floors_that_differ_by_rounding_are_one_line_and_others_none(factory):
    """A floor rescaled from another run's bandwidth need not be that run's own to the last bit."""
    runs = []
    for best in (10.1e9, 20.3e9):
        bandwidth = dataclasses.replace(factory.BANDWIDTH, samples=(best,))
        what = factory.subject(model=f"model {len(runs)}", bundle=f"b{len(runs)}")
        cells = tuple(factory.cell(what, context=context, floor=(5e8 + context) / best) for context in (100, 128, 1000, 1024))
        runs.append(factory.sweep(cells=cells, bandwidth=bandwidth))
    rows = rows_of(runs)
    assert any(len({row.cell.floor for row in rows if row.cell.context == context}) > 1 for context in (100, 128, 1000, 1024))
    figure = latency_by_groups(rows, Styles(rows), "decode")
    assert all('class="muted"' in chart for _, chart in figure.panels)
    assert "Dashed: what memory bandwidth allows at best." in figure.words
    assert [name for _, name in figure.legend].count("floor") == 1
    elsewhere = dataclasses.replace(runs[1], machine=dataclasses.replace(runs[1].machine, cpu="another"))
    rows = rows_of([runs[0], elsewhere])
    figure = latency_by_groups(rows, Styles(rows), "decode")
    assert not any('class="muted"' in chart for _, chart in figure.panels)
    assert "Dashed" not in figure.words
    assert "floor" not in [name for _, name in figure.legend]


def test_the_context_of_an_encoder_decoder_is_explained(factory):
    words = "context is the tokens that the encoder reads"
    assert words not in " ".join(sentences(rows_of([factory.sweep()])))
    cells = (factory.cell(factory.subject(encoder=True)),)
    assert words in " ".join(sentences(rows_of([factory.sweep(cells=cells)])))
