"""The report's figures: axes, and floors beside what was measured."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from profiles.report import render
from profiles.report_data import rows_of
from profiles.report_figures import Styles, latency_by_groups
from profiles.report_svg import nice_axis


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


@pytest.mark.parametrize(
    "values", [[0.0], [1e-9], [3.0, 97.0], [1.0, 1.0], [1e12], [2.0**53], [0.2, 0.21], [128, 4096, 100_000]]
)
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
