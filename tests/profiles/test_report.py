"""The report's page: one file that opens offline, whole and balanced whatever it is given."""

from __future__ import annotations

import dataclasses
import re

import pytest

from exporter.errors import UserError
from exporter.units import size
from profiles import stats
from profiles.report import render, write_report
from profiles.report_data import rows_of
from profiles.units import milliseconds

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"


def test_the_page_is_balanced_and_whole(page, parsed):
    found = parsed(page)
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


def test_nothing_is_fetched_and_nothing_runs(page, parsed):
    found = parsed(page)
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


def test_graphs_measured_apart_are_called_so(factory, parsed):
    def page(cohort):
        cells = [factory.cell(factory.subject(g), cohort=c, median=0.02 + g / 1e3) for g, c in ((9, 0), (1, cohort))]
        return " ".join(parsed(render([factory.sweep(cells=tuple(cells))])).text)

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


def test_hostile_strings_are_text(factory, parsed):
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
    found = parsed(page)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page  # text of the data is never taken for a template


def test_two_runs_of_one_thing_are_told_apart(factory, parsed):
    a, b = factory.sweep(contexts=(128,)), factory.sweep(contexts=(128,))
    series = {row.series for row in rows_of([a, b])}
    assert series == {f"{pattern} · run {run}" for pattern in ("grouped", "gqa", "repeat") for run in (1, 2)}
    assert parsed(render([a, b])).text.count("Run 2, 2026-11-22T01:00:00+00:00") == 1


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


def test_small_and_odd_results_still_make_a_page(factory, parsed):
    one = factory.cell(factory.subject(), samples=(0.01,), floor=None)
    prefill = factory.cell(factory.subject((9, 3, 1)), "prefill", samples=(2.0,))
    for cells in ((one,), (prefill,), (one, prefill), (dataclasses.replace(one, samples=(1e-12,)),)):
        parsed(render([factory.sweep(cells=cells, bandwidth=None)]))
    huge = factory.subject(1, weight_bytes=2**62, kv_bytes_per_token=2**62)
    parsed(render([factory.sweep(cells=(factory.cell(huge, context=2**60, samples=(9e8,), floor=1e-9),))]))
    zero = factory.subject(1, weight_bytes=0, kv_bytes_per_token=0)
    parsed(render([factory.sweep(cells=(factory.cell(zero, floor=None),))]))
    with pytest.raises(UserError, match="hold no cells"):
        render([factory.sweep(cells=())])


def test_an_output_that_exists_is_refused(results, tmp_path):
    path = write_report([results], tmp_path / "r.html")
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(UserError, match="exists; choose another name"):
        write_report([results], path)
