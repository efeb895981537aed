"""How each run was measured, in words: the machine, the software, the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.units import size
from profiles.results import KIND_NAMES, Results

Facts = list[tuple[str, str]]

METHOD = (
    "{graphs} are alive at once and measured in turns, in short bursts whose order reverses every "
    "round, so that a drift of the machine falls on all {alike}; each turn starts with untimed steps that fill the caches. "
    "Garbage collection is off, warm-up is not counted, and every sample is kept. The read bandwidth is measured before, amid "
    "and after the samples; the floor takes the best."
)

# A setting of the run or of its sessions: what it is called, and what follows its value.
SETTINGS = {
    "contexts": ("Contexts", "tokens"),
    "batches": ("Batch", "sequences at once"),
    "kinds": ("Measured", ""),
    "samples": ("Decode", "samples a cell"),
    "burst": ("Burst", "samples in a row"),
    "settle": ("Before a burst", "untimed steps"),
    "warmup": ("Warm-up", "untimed steps"),
    "prefill_samples": ("Prefill", "samples a cell"),
    "seconds": ("Time limit", "s of a cell's samples"),
    "capacity": ("Cache", "rows"),
    "memory": ("Memory limit", ""),
    "seed": ("Seed", ""),
    "backend": ("Backend", ""),
    "threads": ("Threads", ""),
    "optimisation": ("Graph optimisation", ""),
    "chunk": ("Prefill chunk", "tokens"),
}


# A setting's unit where there is one of it.
ONE = {
    "sequences at once": "sequence",
    "tokens": "token",
    "samples a cell": "sample a cell",
    "samples in a row": "sample",
    "untimed steps": "untimed step",
    "rows": "row",
}


def method(results: Sequence[Results]) -> str:
    """How the graphs took turns: all of a batch and context in one cohort, or in several where memory did not hold them."""
    if any(cell.cohort for result in results for cell in result.cells):
        return METHOD.format(graphs="The graphs of one cohort", alike="of them alike, though not on another cohort's")
    return METHOD.format(graphs="All graphs of one batch and context", alike="alike")


@dataclass(frozen=True)
class Run:
    """One run's heading, and its facts under a few headings of their own."""

    heading: str
    parts: tuple[tuple[str, Facts], ...]


def describe(number: int, result: Results) -> Run:
    """`number` counts from 1. Facts that are not known are left out."""
    parts = (("Machine", _machine(result)), ("Software", _software(result)), ("Settings", _settings(result)))
    return Run(f"Run {number}, {result.created}", tuple((name, facts) for name, part in parts if (facts := _known(part))))


def _machine(result: Results) -> Facts:
    machine = result.machine
    return [
        ("CPU", machine.cpu),
        ("Cores", f"{machine.cores}, {machine.cpus} CPUs usable"),
        ("GPU", "; ".join(machine.gpus)),
        ("Memory", size(machine.memory_bytes)),
        ("Last-level cache", size(machine.l3_bytes) if machine.l3_bytes else ""),
        *_bandwidth(result),
        *_arithmetic(result),
        ("Load at start", f"{machine.load:.2f}"),
        ("System", machine.os),
        ("Instructions", " ".join(machine.flags)),
    ]


def _bandwidth(result: Results) -> Facts:
    b = result.bandwidth
    if b is None:
        return []
    spread = f"median {b.median / 1e9:.1f}, worst {min(b.samples) / 1e9:.1f}, of {len(b.samples)}"
    how = f"{size(b.array_bytes)} " + (f"with {b.threads} thread{'s' if b.threads > 1 else ''}" if b.threads else "on the GPU")
    return [("Read bandwidth", f"{b.best / 1e9:.1f} GB/s at best ({spread}), reading {how}")]


def _arithmetic(result: Results) -> Facts:
    a = result.arithmetic
    if a is None:
        return []
    threads = f"{a.threads} thread{'s' if a.threads > 1 else ''}"
    return [("Arithmetic", f"{a.best / 1e9:.0f} billion float32 operations a second at best, with {threads}")]


def _software(result: Results) -> Facts:
    versions = dict(result.versions)
    commit, tree = versions.pop("commit", ""), versions.pop("tree", "")
    for cell in result.cells:
        versions |= cell.versions
    backends = sorted({f"{cell.backend} on {cell.provider}" for cell in result.cells})
    changed = {"dirty": ", with changes not committed", "clean": ""}.get(tree, "")
    return [("Backend", "; ".join(backends)), *versions.items(), ("Commit", commit[:12] + changed if commit else "")]


def _settings(result: Results) -> Facts:
    options: dict[str, list[Any]] = {}
    for cell in result.cells:
        for name, value in cell.options.items():
            if value not in options.setdefault(name, []):
                options[name].append(value)
    kinds = {cell.kind for cell in result.cells}
    idle = {"backend"} | ({"samples"} if "decode" not in kinds else {"prefill_samples"} if kinds == {"decode"} else set())
    chosen = {name: value for name, value in result.settings.items() if value is not None and name not in idle}
    facts = [_setting(name, value) for name, value in chosen.items() if name not in options]
    facts += [_setting(name, values if len(values) > 1 else values[0]) for name, values in options.items()]
    cohorts = 1 + max((cell.cohort for cell in result.cells), default=0)
    return [
        *facts,
        (
            "Cohorts",
            f"up to {cohorts}, each in turns of its own: memory did not hold all graphs at once" if cohorts > 1 else "",
        ),
        ("Notes", "; ".join(result.notes)),
    ]


def _setting(name: str, value: Any) -> tuple[str, str]:
    label, unit = SETTINGS.get(name, (name.replace("_", " ").capitalize(), ""))
    if name == "memory" and isinstance(value, (int, float)):
        return label, size(value)
    text = _text(value)
    return label, f"{text} {ONE.get(unit, unit) if text == '1' else unit}".strip()


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    text = str(value)
    return KIND_NAMES[text].lower() if text in KIND_NAMES else text


def _known(facts: Facts) -> Facts:
    return [(name, value) for name, value in facts if value]
