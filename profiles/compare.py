"""Two result files side by side: which cells became slower or faster, and how sure that is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table

from exporter.errors import UserError
from profiles import stats
from profiles.noise import busy
from profiles.results import Cell, Results
from profiles.table import add_columns, constants, optional, plain_table, values, with_warnings
from profiles.units import milliseconds

Key = tuple[int | tuple[int, ...], str, str, str, int, int, str]


@dataclass(frozen=True)
class Pair:
    """One cell in both files. `ratio` is median(b) / median(a), `low` … `high` its 95 % bootstrap interval."""

    a: Cell
    b: Cell
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """slower or faster where the interval lies wholly on that side of 1, else the same; "few samples" without one."""
        if self.high == math.inf:
            return "few samples"
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"

    @property
    def apart(self) -> bool:
        """Whether the cell was measured in turns with other graphs in the one run than in the other."""
        return self.a.cohort != self.b.cohort


@dataclass(frozen=True)
class Comparison:
    """`warnings` say why the two files may not be comparable, `busy` which of them was measured on a busy machine;
    `only_a` and `only_b` count cells without a partner."""

    pairs: tuple[Pair, ...]
    only_a: int
    only_b: int
    warnings: tuple[str, ...]
    busy: tuple[str, ...] = ()

    def failures(self, above: float) -> list[Pair]:
        """Pairs that are surely slower than `above` times: even the lower end of the interval is past it.

        With 95 % intervals one pair in forty whose true ratio is exactly `above` is reported by chance.
        """
        if not above > 0:
            raise UserError(f"--fail-above {above} is not a positive ratio; 1.05 allows 5 % more time")
        return [pair for pair in self.pairs if pair.low > above]


def key(cell: Cell) -> Key:
    """What makes two cells the same measurement: (G, pattern, cache, dtype, batch, context, kind)."""
    subject = cell.subject
    return subject.groups, subject.pattern, subject.cache, subject.dtype, cell.batch, cell.context, cell.kind


def compare(a: Results, b: Results) -> Comparison:
    """Match the cells of `a` and `b`. Raises UserError when none match or a file holds one cell twice."""
    cells_a, cells_b = _by_key(a, "the first"), _by_key(b, "the second")
    pairs = []
    for name, cell in cells_a.items():
        if other := cells_b.get(name):
            low, high = stats.ratio_interval(other.samples, cell.samples, block=max(cell.burst, other.burst))
            pairs.append(Pair(cell, other, stats.median(other.samples) / stats.median(cell.samples), low, high))
    if not pairs:
        raise UserError(
            "the two files have no cell in common (KV heads, pattern, cache, dtype, batch, context and kind must agree)"
        )
    disturbed = tuple(f"{name}: {text}" for name, text in (("a", busy(a)), ("b", busy(b))) if text)
    return Comparison(tuple(pairs), len(cells_a) - len(pairs), len(cells_b) - len(pairs), tuple(_warnings(a, b)), disturbed)


def comparison_view(comparison: Comparison, fail_above: float | None = None) -> Group:
    """For a terminal: what the reader must know first, then the table."""
    return with_warnings(comparison.busy, comparison_table(comparison, fail_above))


def comparison_table(comparison: Comparison, fail_above: float | None = None) -> Table:
    """One row a pair, milliseconds and ratio b / a; failures are marked."""
    failed = comparison.failures(fail_above) if fail_above is not None else []
    title, varying = constants(pair.a for pair in comparison.pairs)
    alone = [f"{count} of {name}" for name, count in (("a", comparison.only_a), ("b", comparison.only_b)) if count]
    footer = "medians; 95 % bootstrap interval of their ratio, which holds any drift of the machine between the two runs"
    footer += "; *: measured beside other graphs in b than in a" if any(pair.apart for pair in comparison.pairs) else ""
    table = plain_table(title, f"{footer}; without a partner: {', '.join(alone)}" if alone else footer)
    add_columns(table, varying, ("context", "a ms", "b ms", "b / a", "interval", "verdict"))
    for pair in comparison.pairs:
        row = [
            pair.a.subject.groups_label,
            pair.a.subject.pattern,
            *(optional(pair.a)[name] for name in varying),
            f"{pair.a.context:,}",
            milliseconds(stats.median(pair.a.samples)),
            milliseconds(stats.median(pair.b.samples)),
            f"{pair.ratio:.3f}",
            (f"{pair.low:.3f}–{pair.high:.3f}" if pair.high < math.inf else "") + " *" * pair.apart,
            f"slower than {fail_above:g}×" if pair in failed else pair.verdict,
        ]
        style = "bold red" if pair in failed else {"slower": "yellow", "faster": "green"}.get(pair.verdict, "")
        table.add_row(*values(row), style=style)
    return table


def _by_key(results: Results, which: str) -> dict[Key, Cell]:
    counts = Counter(key(cell) for cell in results.cells)
    for name, count in counts.items():
        if count > 1:
            raise UserError(
                f"{which} file holds {count} cells of {_words(name)}; measure one model on one backend a file to compare"
            )
    return {key(cell): cell for cell in results.cells}


def _words(name: Key) -> str:
    """ "8 KV heads, grouped, static, fp32, batch 1, 1,024 tokens, decode"."""
    groups, pattern, cache, dtype, batch, context, kind = name
    heads = ", ".join(map(str, groups)) + " (by layer)" if isinstance(groups, tuple) else str(groups)
    return f"{heads} KV head{'s' * (groups != 1)}, {pattern}, {cache}, {dtype}, batch {batch}, {context:,} tokens, {kind}"


def _warnings(a: Results, b: Results) -> list[str]:
    pairs = {
        "CPU": (a.machine.cpu, b.machine.cpu),
        "number of CPUs": (a.machine.cpus, b.machine.cpus),
        "GPUs": (a.machine.gpus, b.machine.gpus),
        "models": tuple(sorted({c.subject.model for c in r.cells}) for r in (a, b)),
        "backends": tuple(sorted({f"{c.backend} {c.provider}" for c in r.cells}) for r in (a, b)),
        "session options": tuple(sorted({str(sorted(c.options.items())) for c in r.cells}) for r in (a, b)),
    }
    return [f"different {name}: {_show(one)} and {_show(other)}" for name, (one, other) in pairs.items() if one != other]


def _show(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)
