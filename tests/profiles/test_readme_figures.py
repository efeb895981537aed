"""What the pages say of the measurements is what the committed measurements say."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from profiles.benchmarks import readme
from profiles.results import Arithmetic, Results

PAGES = readme.texts(readme.FOLDER)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(readme.ROOT)))
def test_pages_hold_the_measured_figures(page):
    text = page.read_text("utf-8")
    assert readme.replace(text, PAGES[page]) == text, "run python -m profiles.benchmarks.readme"


def test_the_table_is_of_the_samples():
    """Against medians taken here by sorting, for every figure of the table."""
    run = Results.load(readme.FOLDER / "smollm2.json")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.table(run).splitlines()]
    counts = [int(heading.removeprefix("G = ")) for heading in rows[0][2:-1]]
    found = {}
    for name, context, *figures, _ in rows[2:]:
        if context:
            pattern = re.match("`(.*?)`", name)[1]
            found |= {(pattern, int(context.replace(",", "")), g): float(f) for g, f in zip(counts, figures, strict=True)}
    assert len(found) == len({cell.subject.pattern for cell in run.cells}) * 2 * len(counts)
    for cell in run.cells:
        ordered = sorted(cell.samples)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        shown = found.pop((cell.subject.pattern, cell.context, cell.subject.groups), None)
        assert shown is None or shown == pytest.approx(middle * 1e3, abs=0.0501)
    assert not found


def test_targets_that_are_met_are_no_limit(factory):
    def cells(over):
        return [
            factory.cell(factory.subject(g, "grouped"), context=context, samples=(over * 0.01,), floor=0.01)
            for g in (16 - 8, 1)
            for context in readme.LIMITS
        ]

    assert readme.limit(cells(1.1)) == "\n"
    assert "1.1 × at 512 tokens (met: 1.10 / 1.10), 1.15 × at 4,096 tokens (met: 1.10 / 1.10)" in readme.targets(cells(1.1))
    # Each context has a target of its own.
    assert "1.1 × the floor at 512 tokens is not met in `grouped` (1.12 ×)" in readme.limit(cells(1.12))
    assert "4,096" not in readme.limit(cells(1.12))
    assert "at 512 tokens (**not met**: 1.12 / 1.12), 1.15 × at 4,096 tokens (met: 1.12 / 1.12)" in readme.targets(cells(1.12))
    assert "at 512 tokens (**not met**: 1.104 / 1.104)" in readme.targets(cells(1.1044))
    assert "(1.104 ×)" in readme.limit(cells(1.1044))
    assert "(1.1004 ×)" in readme.limit(cells(1.1004))
    assert "4,096" in readme.limit(cells(1.4))


def test_what_further_tokens_cost_beside_memory_or_arithmetic(factory):
    """31 GB/s and 200 GFLOP/s: of 4 KV heads memory bounds (1 µs a token), of 1 arithmetic (0.5 µs)."""
    floors = {4: (31_000, 1e-6), 1: (7_750, 0.5e-6)}

    def said(over, spread=0.0):
        cells = []
        for groups, (kv_bytes, floor) in floors.items():
            subject = factory.subject(groups, kv_bytes_per_token=kv_bytes, attention_operations=100_000)
            for context in readme.LIMITS:
                samples = tuple(0.02 + over[groups] * floor * context * (1 + spread * (i // 8 - 2)) for i in range(40))
                cells.append(factory.cell(subject, context=context, samples=samples, floor=0.02))
        return readme.slopes(cells, factory.sweep(arithmetic=Arithmetic(2, (150e9, 200e9))))

    met = said({4: 1.2, 1: 1.49})
    assert met.startswith("1,000 further tokens of context cost 1.20 / 0.745 ms at G = 4 / 1, 1.20 / 1.49 × their floor")
    assert met.endswith("(target 1.5, met)")
    assert "1.20 / 1.51 × their floor of memory or arithmetic (target 1.5, **not met**)" in said({4: 1.2, 1: 1.51})
    assert re.search(
        r"\(target 1.5, met, \*\*not decided\*\* at G = 1: 1.[34]. to 1.[56].\)", said({4: 1.2, 1: 1.49}, spread=0.05)
    )


def test_other_shapes_and_text(tmp_path):
    """Made-up rows of 4 and 1 KV heads; the larger of two times counts, and the fastest of the others."""
    here = tmp_path / "here"
    here.mkdir()
    place = {"what": "decode", "weights": "fp32"}
    rows = []
    for context in readme.LIMITS:
        for groups, ms in ((4, 10.4), (1, 10.2)):
            cell = {**place, "groups": groups, "context": context, "floor_ms": 10.0}
            rows += [{**cell, "runtime": "headpool `fused`", "ms": ms + more, "to_headpool": 1.0} for more in (0.0, 0.1)]
            rows += [{**cell, "runtime": name, "ms": 0, "to_headpool": times + groups} for name, times in (("a", 2), ("b", 1))]
    (here / "peers-128.json").write_text(json.dumps({"rows": rows}))
    words = readme.shape(here, "peers-128")
    assert f"1.05 / 1.03 × the floor at 4,096 tokens (target {readme.LIMITS[4096]:g}, met)" in words
    assert "5.00 / 2.00 × as fast in a step after 512 tokens" in words
    assert words.endswith("(fp32, G = 4 / 1)")
    assert "not decided" not in words
    rows[-1] |= {"low": 0.9, "high": 2.5}
    (here / "peers-128.json").write_text(json.dumps({"rows": rows}))
    assert "5.00 / 2.00 × as fast in a step after 4,096 tokens (**not decided** at G = 1: 0.90 to 2.50)" in readme.shape(
        here, "peers-128"
    )
    rows[0]["ms"] = 10 * readme.LIMITS[512] + 0.1
    (here / "peers-128.json").write_text(json.dumps({"rows": rows}))
    assert readme.shape(here, "peers-128").count("**not met**") == 1
    rows = [{**row, "weights": "int4"} for row in rows]
    (here / "peers-int4.json").write_text(json.dumps({"rows": rows}))
    words = readme.int4(here)
    assert words == "5.00 / 2.00 × as fast as the fastest other runtime at G = 4 / 1 and 4,096 tokens (target 1.5, met)"
    words = readme.peers(here, "peers-int4")
    assert words.startswith("The same model and int4 weights in a and b, all in turns: `fused`, beside the fastest of them, is")
    rows[-1]["to_headpool"] = 1.4
    (here / "peers-int4.json").write_text(json.dumps({"rows": rows}))
    assert "5.00 / 1.40 ×" in readme.int4(here)
    assert "**not met**" in readme.int4(here)
    assert readme.peers(here, "gone") == readme.int4(tmp_path) == ""
    row = {"prompt_tokens": 1024, "beside": "b", "times": 1.5, "low": 1.4, "high": 1.6}
    row["tokens_per_second"] = {"headpool": 151.2, "a": 50.0, "b": 100.8}
    settings = {"weight_bytes": {"headpool": 84_000_000, "llama.cpp": 91_000_000}}
    machine = {"cpu": "Fast 1", "l3_bytes": 33_554_432}
    (here / "text.json").write_text(json.dumps({"rows": [row], "settings": settings, "machine": machine}))
    words = readme.generated(here)
    assert "makes 151 tokens a second after a text of 1,024 tokens" in words
    assert "101: 1.50 (1.40 to 1.60) ×" in words
    assert readme.shape(here, "gone") == ""
    other = tmp_path / "other"
    other.mkdir()
    assert readme.generated(other) == f"{words}, on another machine (Fast 1, 33.6 MB of last-level cache)"
    (here / "text.json").unlink()
    assert readme.generated(here) == ""


def test_only_marked_parts_change_and_marks_must_be_there():
    page = "a <!-- x:begin -->old\n\\1<!-- x:end --> b"
    assert readme.replace(page, {"x": "new \\1"}) == "a <!-- x:begin -->new \\1<!-- x:end --> b"
    with pytest.raises(AssertionError, match="0 parts are marked y"):
        readme.replace(page, {"y": ""})


def test_a_busy_run_says_so_on_the_first_page(tmp_path):
    folder = tmp_path / readme.FOLDER.name
    for path in readme.FOLDER.parent.glob("*/*.json"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).symlink_to(path)
    run = Results.load(readme.FOLDER / "smollm2.json")
    (folder / "smollm2.json").unlink()
    dataclasses.replace(run, bandwidth=dataclasses.replace(run.bandwidth, samples=(3e10, 1e10, 1e10))).save(
        folder / "smollm2.json"
    )
    text = readme.results(folder)
    assert 0 < text.index("Busy machine") < text.index("| pattern |")
    assert "Busy" not in readme.results(readme.FOLDER)
