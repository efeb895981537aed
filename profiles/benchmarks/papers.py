"""The papers' experiments beside the papers' numbers, as one page, from what was measured: t5-decoding.json (GQA, figure 6 and
table 1) and glu-training.json (GLU variants, table 1; GLU attention).

    python -m profiles.benchmarks.papers OUT.html [T5-DECODING.json GLU-TRAINING.json]

Without them, those in profiles/results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from exporter.files import write_text
from profiles import report_page
from profiles.machine import ROOT
from profiles.report_figures import Figure, Table
from profiles.report_svg import Axis, Point, Series, line_chart, nice_axis, ordinal_axis, swatch

RESULTS = ROOT / "profiles" / "results"
T5, GLU = RESULTS / "emerald-2core" / "t5-decoding.json", RESULTS / "xeon-2core" / "glu-training.json"
Row = dict[str, Any]


def render(t5: Row, glu: Row) -> str:
    """The page as text, from the two records."""
    steps = f"{glu['settings']['steps']} steps"
    return (
        report_page.environment()
        .get_template("frame")
        .render(
            kind="headpool",
            title="The papers' experiments, at the scale of two CPU cores",
            warnings=(),
            css=Markup(report_page.css(2)),
            subtitle="; ".join(
                f"{what}: {record['machine']['cpu']}, {record['machine']['cores']} cores · {record['created'][:10]}"
                for what, record in (("T5", t5), ("GLU", glu))
            ),
            figures=[
                decoding(t5["rows"]),
                variants([row for row in glu["settings"]["summary"] if row["paper"] is not None], steps),
                attention(glu["rows"], steps),
            ],
        )
    )


def decoding(rows: Sequence[Row]) -> Figure:
    """Time per sample and attention's time by KV heads, as shares of multi-head attention's."""
    rows = sorted(rows, key=lambda row: row["groups"])
    names, full = [str(row["groups"]) for row in rows], rows[-1]
    x = ordinal_axis("KV heads", names)

    def line(label: str, style: str, shape: int, key: str) -> Series:
        found = [(i, row[key] / full[key], row[key]) for i, row in enumerate(rows) if row[key] is not None]
        return Series(label, style, tuple(Point(i, share, f"{label}: {value:.3g}") for i, share, value in found), shape)

    lines = {
        "a sample here": line("a sample here, s", "s0", 0, "sample_s"),
        "attention of a step here": line("attention of a step here, ms", "s1", 1, "attention_ms"),
        "a sample in the paper (24 + 24 layers, TPUv4)": line("a sample in the paper, s", "s2", 2, "paper_s"),
    }
    chart = line_chart("Time by KV heads", list(lines.values()), x, nice_axis("× the time of MHA", [0, 1]), False)
    table = Table(
        ("KV heads", "s a sample", "s to the first token", "ms a step", "attention ms", "× faster", "the paper's s a sample"),
        tuple(
            (str(row["groups"]), f"{row['sample_s']:.1f}", f"{row['first_token_s']:.1f}", f"{row['step_ms']:.1f}",
             f"{row['attention_ms']:.2f}", f"{row['attention_gain']:.2f}", f"{row['paper_s'] or ''}")
            for row in rows
        ),
    )  # fmt: skip
    least = rows[0]
    missed = [f"{row['groups']} KV heads" for row in rows if not row.get("kept", True)]
    target = (
        f"The target, attention in at most 1 / (0.7 · H/G) of MHA's time, is missed with {', '.join(missed)}." if missed else ""
    )
    words = (
        "T5-XXL's layers (Ainslie et al. 2023, figure 6 and table 1), 2,048 tokens in and 512 out, one sample at a time, fp32, "
        f"pattern {full['pattern']}. "
        "At batch 1 weights are most of a step, and no grouping shrinks those but K's and V's: with 1 KV head a sample takes "
        f"{least['sample_s'] / full['sample_s']:.2f} × the time here, 0.16 × in the paper, whose batches are larger; attention "
        f"alone takes 1/{least['attention_gain']:.0f}. {target}"
    ).rstrip()
    legend = tuple((swatch(s.style, s.shape), name) for name, s in lines.items())
    return Figure("decoding", "Time per sample by KV heads", words, (("", chart),), table, legend)


def variants(rows: Sequence[Row], steps: str) -> Figure:
    """Log-perplexity of each FFN, ours with its spread and the paper's."""
    from scipy.stats import spearmanr

    rows = sorted(rows, key=lambda row: -row["paper"])
    x = ordinal_axis("FFN, in the paper's order", [row["ffn"] for row in rows])
    ours = tuple(
        Point(i, row["nats_per_token"], f"{row['ffn']} {row['nats_per_token']:.4f} ± {row['spread']:.4f}",
              row["nats_per_token"] - row["spread"], row["nats_per_token"] + row["spread"])
        for i, row in enumerate(rows)
    )  # fmt: skip
    paper = tuple(Point(i, row["paper"], f"{row['ffn']} {row['paper']}") for i, row in enumerate(rows))
    panels = tuple(
        (heading, line_chart(heading, [Series(heading, style, points, shape)], x, _axis(points), False))
        for heading, style, points, shape in (
            (f"here, {steps}, mean and spread of the seeds", "s0", ours, 0),
            ("the paper, 65,536 steps", "s2", paper, 2),
        )
    )
    found = spearmanr([row["nats_per_token"] for row in rows], [row["paper"] for row in rows])
    gated = [row["nats_per_token"] for row in rows if row["ffn"] not in ("relu", "gelu", "swish")]
    plain = [row["nats_per_token"] for row in rows if row["ffn"] in ("relu", "gelu", "swish")]
    words = (
        "Eight FFNs at equal parameters (Shazeer 2020, table 1): held-out log-perplexity, lower is better. Here the gated ones "
        f"have {sum(gated) / len(gated):.3f} in the mean, the others {sum(plain) / len(plain):.3f}; the rank correlation with "
        f"the paper's order is {found.statistic:.2f} (p = {found.pvalue:.2f}). "
        f"From the best on, here: {_order(rows, 'nats_per_token')}; in the paper: {_order(rows, 'paper')}."
    )
    table = Table(
        ("FFN", "nats a token", "spread", "the paper's"),
        tuple((row["ffn"], f"{row['nats_per_token']:.4f}", f"{row['spread']:.4f}", f"{row['paper']:.3f}") for row in rows),
    )
    return Figure("variants", "GLU variants", words, panels, table)


def attention(rows: Sequence[Row], steps: str) -> Figure:
    """Held-out loss by step of plain and of GLU attention, the mean of the seeds."""
    rows = [row for row in rows if row["ffn"] == "swiglu"]
    kinds = {"plain": ("plain attention", "s0", 0), "glu": ("GLU attention", "s1", 1)}
    lines = []
    curves = {kind: [row["curve"] for row in rows if row["attention"] == kind] for kind in kinds}
    for kind, (label, style, shape) in kinds.items():
        points = []
        for places in zip(*curves[kind], strict=True):
            values = [loss for _, loss in places]
            mean = sum(values) / len(values)
            points.append(Point(places[0][0], mean, f"{label}: {mean:.4f}", min(values), max(values)))
        lines.append(Series(label, style, tuple(points[1:]), shape))  # the first is before any training
    table = [
        (f"{a.x:g}", f"{a.y:.4f}", f"{b.y:.4f}", f"{b.y - a.y:+.4f}")
        for a, b in zip(lines[0].points, lines[1].points, strict=True)
    ]
    ends = {row["seed"]: {r["attention"]: r["nats_per_token"] for r in rows if r["seed"] == row["seed"]} for row in rows}
    better = sum(end["glu"] < end["plain"] for end in ends.values())
    x = nice_axis("steps", [point.x for point in lines[0].points])
    y = _axis([point for line in lines for point in line.points])
    words = (
        f"GLU attention against plain attention at equal parameters (Wang 2025), beside the same SwiGLU: loss on held-out "
        f"windows after {steps} the lower one with {better} of {len(ends)} seeds. Its V cache has two thirds of the channels. "
        "The paper (6 layers of 384 channels, WikiText-2 and -103) draws training losses without numbers, that of GLU "
        "attention the lower one all along. "
        "Whiskers: the seeds' least and largest."
    )
    chart = line_chart("Loss by step", lines, x, y, False)
    legend = tuple((swatch(line.style, line.shape), line.label) for line in lines)
    headings = ("steps", "plain, nats a token", "GLU attention", "difference")
    return Figure("glu-attention", "GLU attention", words, (("", chart),), Table(headings, tuple(table)), legend)


def _order(rows: Sequence[Row], key: str) -> str:
    return ", ".join(row["ffn"] for row in sorted(rows, key=lambda row: row[key]))


def _axis(points: Sequence[Point]) -> Axis:
    values = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    return nice_axis("nats a token", values, zero=False)


def main() -> None:
    out, *files = (Path(word) for word in sys.argv[1:])
    t5, glu = (json.loads(file.read_text("utf-8")) for file in files or (T5, GLU))
    print(write_text(out, render(t5, glu)))


if __name__ == "__main__":
    main()
