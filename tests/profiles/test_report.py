from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from exporter.errors import UserError
from profiles import stats
from profiles.report import render, write_report
from profiles.report_data import rows_of
from profiles.report_svg import nice_axis
from profiles.report_words import headline
from profiles.table import milliseconds

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
    cells = set(re.findall(r"<td>(.*?)</td>", page))
    for cell in results.cells:
        times = stats.summary(cell.samples)
        assert {milliseconds(value) for value in (times.p10, times.p50, times.p90, times.p99)} <= cells
        assert f"{cell.subject.kv_bytes_per_token:,}" in cells
        if cell.floor:
            assert {milliseconds(cell.floor), f"{times.p50 / cell.floor:.2f}"} <= cells
        for value in (cell.breakdown or {}).values():
            assert f"{value * 1e3:.3f}" in cells
        assert f"{cell.quality['loss']:.4g}" in cells


def test_the_headline_is_computed(results, page):
    found = headline(rows_of([results]))
    assert (found.few.groups, found.many.groups, found.few.series) == ("1", "9", "grouped")
    assert found.few.cell.context == 4096
    ratio = found.many.times.p50 / found.few.times.p50
    text = " ".join(Page(page).text)
    assert f"{ratio:.2f} times as fast" in text
    assert f"{milliseconds(found.few.times.p50)} ms" in text
    assert "15.4 kB a token rather than 138 kB" in text
    assert "loss goes from 2.59 to 4.61" in text


def test_noise_is_named(factory):
    what = [factory.subject(g) for g in (9, 1)]
    samples = tuple(0.01 + 0.02 * (i % 3) for i in range(12))
    cells = tuple(factory.cell(w, context=c, samples=s) for w in what for c, s in ((128, (0.5, 0.6)), (1024, samples)))
    busy = factory.sweep(cells=cells, bandwidth=dataclasses.replace(factory.BANDWIDTH, samples=(30e9, 12e9, 15e9)))
    text = " ".join(Page(render([busy])).text)
    assert "so it may be no change at all" in text
    assert "nothing measurable with 1 KV head" in text
    assert "its bandwidth was typically 50% of its best" in text
    assert "busy" not in render([factory.sweep()])


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
