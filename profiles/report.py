"""One self-contained HTML page from results: it opens offline, in light and dark, on a phone and on a desk."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from exporter.errors import UserError
from exporter.files import write_text
from profiles import report_extras, report_figures, report_page, report_runs, report_words
from profiles.noise import busy_runs
from profiles.report_data import Row, grouped, rows_of
from profiles.report_figures import Table
from profiles.results import Results


def write_report(results: Sequence[Results], out: str | Path) -> Path:
    """Write the page to `out`, which must not exist. Raises UserError."""
    return write_text(Path(out), render(results))


def render(results: Sequence[Results]) -> str:
    """The page as text. Every string of the results is escaped. Raises UserError when there is nothing to show."""
    rows = rows_of(results)
    if not rows:
        raise UserError("the results hold no cells; measure with 'headpool profile' first")
    styles = report_figures.Styles(rows)
    figures = [
        report_figures.latency_by_groups(rows, styles, "decode"),
        report_figures.latency_by_context(rows, styles),
        report_extras.kv_memory(rows, styles),
        report_figures.ratio_to_floor(rows, styles),
        report_extras.quality(rows, styles),
        report_extras.where_time_goes(rows),
        report_extras.slowest_layers(rows),
        report_figures.latency_by_groups(rows, styles, "ttft"),
        report_figures.latency_by_groups(rows, styles, "prefill"),
    ]
    models = list(dict.fromkeys(row.subject.model for row in rows))
    return (
        report_page.environment()
        .get_template("report")
        .render(
            kind="headpool report",
            title=", ".join(models),
            subtitle=_subtitle(results),
            warnings=busy_runs(results),
            tiles=report_words.tiles(rows),
            sentences=report_words.sentences(rows),
            figures=[figure for figure in figures if figure],
            css=Markup(report_page.css(len(styles.groups))),
            method=report_runs.method(results),
            runs=[report_runs.describe(number, result) for number, result in enumerate(results, 1)],
            subjects=_subjects(rows),
        )
    )


def _subtitle(results: Sequence[Results]) -> str:
    cpus = dict.fromkeys(" + ".join([f"{r.machine.cpu}, {r.machine.cores} cores", *r.machine.gpus]) for r in results)
    dates = sorted({result.created[:10] for result in results})
    return f"Measured on {'; '.join(cpus)} · {' … '.join(dates[:1] + dates[1:][-1:])}"


def _subjects(rows: Sequence[Row]) -> Table:
    parts = grouped(rows, lambda row: (row.subject.bundle_hash, row.subject.variant))
    headings = (
        *("variant", "KV heads", "query heads", "pattern", "cache", "dtype", "conversion", "opened in", "bundle"),
        "sha256 of bundle",
    )
    lines = [
        (
            *(s.variant, s.groups_label, str(s.heads), s.pattern, s.cache, s.dtype, report_extras.method(row)),
            *(_load(part), s.bundle, s.bundle_hash[:16]),
        )
        for part in parts.values()
        for row in part[-1:]
        for s in [row.subject]
    ]
    return Table(headings, tuple(lines))


def _load(rows: Sequence[Row]) -> str:
    """The median of its sessions: the first of a run may have read its files from disk."""
    seconds = [row.cell.load for row in rows if row.cell.load is not None]
    return f"{statistics.median(seconds):.2g} s" if seconds else ""
