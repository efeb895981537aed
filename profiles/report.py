"""One self-contained HTML page from results: it opens offline, in light and dark, on a phone and on a desk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from exporter.errors import UserError
from exporter.files import write_text
from profiles import report_extras, report_figures, report_page, report_words
from profiles.report_data import Row, rows_of, size
from profiles.report_figures import Table
from profiles.results import Results

METHOD = (
    "All graphs of one batch and context are alive at once and measured in turns, in short bursts whose order reverses every "
    "round, so that a drift of the machine falls on all alike; each turn starts with untimed steps that fill the caches. "
    "Garbage collection is off, warm-up is not counted, and every sample is kept. The read bandwidth is measured before, amid "
    "and after the samples; the floor takes the best."
)


def write_report(results: Sequence[Results], out: str | Path) -> Path:
    """Write the page to `out`, which must not exist. Raises UserError."""
    return write_text(Path(out), render(results))


def render(results: Sequence[Results]) -> str:
    """The page as text. Every string of the results is escaped. Raises UserError when there is nothing to show."""
    rows = rows_of(results)
    if not rows:
        raise UserError("the results hold no cells; measure with 'headpool profile' first")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    table = environment.from_string(report_page.TABLE).module.table  # type: ignore[attr-defined]
    styles = report_figures.Styles(rows)
    figures = [
        report_figures.latency_by_groups(rows, styles, "decode"),
        report_figures.latency_by_context(rows, styles),
        report_extras.kv_memory(rows, styles),
        report_figures.ratio_to_floor(rows, styles),
        report_extras.quality(rows, styles),
        report_extras.where_time_goes(rows),
        report_figures.latency_by_groups(rows, styles, "ttft"),
        report_figures.latency_by_groups(rows, styles, "prefill"),
    ]
    models = list(dict.fromkeys(row.subject.model for row in rows))
    return environment.from_string(report_page.TEMPLATE).render(
        title=", ".join(models),
        subtitle=_subtitle(results),
        tiles=report_words.tiles(rows),
        sentences=report_words.sentences(rows, results),
        figures=[figure for figure in figures if figure],
        css=Markup(report_page.css(len(styles.groups))),
        method=METHOD,
        runs=[_run(index, result) for index, result in enumerate(results)],
        subjects=_subjects(rows),
        table=table,
    )


def _subtitle(results: Sequence[Results]) -> str:
    cpus = dict.fromkeys(" + ".join([f"{r.machine.cpu}, {r.machine.cores} cores", *r.machine.gpus]) for r in results)
    dates = sorted({result.created[:10] for result in results})
    return f"Measured on {'; '.join(cpus)} · {' … '.join(dates[:1] + dates[1:][-1:])}"


def _run(index: int, result: Results) -> dict[str, Any]:
    machine = result.machine
    runtimes = {f"{name} {version}" for cell in result.cells for name, version in cell.versions.items()}
    backends = {f"{cell.backend} on {cell.provider}" for cell in result.cells}
    options = {", ".join(f"{k} {v}" for k, v in sorted(cell.options.items())) for cell in result.cells}
    facts = [
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {machine.cpus} CPUs usable"),
        ("GPU", "; ".join(machine.gpus)),
        ("Memory", f"{size(machine.memory_bytes)}, last-level cache {size(machine.l3_bytes)}"),
        ("Bandwidth", _bandwidth(result)),
        ("Instructions", " ".join(machine.flags)),
        ("System", machine.os),
        ("Load at start", f"{machine.load:.2f}"),
        ("Versions", ", ".join(sorted({*runtimes, *(f"{n} {v}" for n, v in result.versions.items())}))),
        ("Backend", "; ".join(sorted(backends))),
        ("Options", "; ".join(sorted(options))),
        ("Settings", ", ".join(f"{name} {value}" for name, value in result.settings.items() if value is not None)),
        ("Cohorts", _cohorts(result)),
        ("Notes", "; ".join(result.notes)),
    ]
    return {"heading": f"Run {index + 1}, {result.created}", "facts": [(name, value) for name, value in facts if value]}


def _bandwidth(result: Results) -> str:
    if result.bandwidth is None:
        return ""
    b = result.bandwidth
    spread = f"best of {len(b.samples)}, worst {min(b.samples) / 1e9:.1f}"
    return f"{b.best / 1e9:.1f} GB/s read by {b.threads} threads ({spread}), array of {size(b.array_bytes)}"


def _cohorts(result: Results) -> str:
    count = 1 + max((cell.cohort for cell in result.cells), default=0)
    return "" if count == 1 else f"memory did not hold all graphs at once: up to {count} cohorts, each in turns of its own"


def _subjects(rows: Sequence[Row]) -> Table:
    unique = {(row.subject.bundle_hash, row.subject.variant): row for row in rows}
    headings = ("variant", "KV heads", "query heads", "pattern", "cache", "dtype", "conversion", "bundle", "sha256 of bundle")
    lines = [
        (
            *(s.variant, s.groups_label, str(s.heads), s.pattern, s.cache, s.dtype, report_extras.method(row)),
            *(s.bundle, s.bundle_hash[:16]),
        )
        for row in unique.values()
        for s in [row.subject]
    ]
    return Table(headings, tuple(lines))
