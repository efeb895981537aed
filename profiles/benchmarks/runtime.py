"""The C++ runtime beside the Python engine, on one bundle: decode a token, and what a session costs beside ONNX Runtime's Run.

Promise: p50 of a decode step in C++ is at most 1.03 × the Python engine's, and a session adds less than 20 µs to Run.

The two programs run in turns, each in a process of its own with the same number of threads: runtime/examples/bench and
`headpool profile`. A row's ratio is the median over the turns of the ratio within a turn, so that a drift of the machine from
turn to turn cancels. What a session adds is measured in one process on a tiny model (runtime/tests/step), where a Run takes a
few microseconds and nothing hides it.

    cmake -S runtime -B build/runtime -DCMAKE_PREFIX_PATH="$(scripts/cpp_deps --runtime)" && cmake --build build/runtime
    python -m profiles.benchmarks.runtime OUT.json CHECKPOINT [BUILD]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from exporter.checkpoint import open_source
from exporter.export import ExportOptions, export
from exporter.files import refuse_existing
from profiles.benchmarks.process import headpool
from profiles.benchmarks.record import save
from profiles.machine import ROOT
from profiles.results import Results
from profiles.stats import median

PATTERNS = ("fused", "grouped", "gqa")
CONTEXTS = "128,1024"
SAMPLES, TURNS = 104, 5
RATIO, MICROSECONDS = 1.03, 20
PROMISE = (
    f"p50 of a decode step in C++ ≤ {RATIO} × the Python engine's; a session adds < {MICROSECONDS} µs to ONNX Runtime's Run"
)
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
TINY_PATTERNS = ("grouped", "gqa", "attention")


def in_cpp(build: Path, bundle: Path, variant: str, out: Path) -> dict[int, float]:
    """Median seconds a token by context."""
    words = map(str, (build / "examples/bench", bundle, variant, out, CONTEXTS, SAMPLES))
    subprocess.run(list(words), check=True, stdout=subprocess.DEVNULL)
    return medians(out)


def in_python(bundle: Path, variant: str, out: Path) -> dict[int, float]:
    options = {"variants": variant, "contexts": CONTEXTS, "kinds": "decode", "samples": SAMPLES, "out": out}
    headpool("profile", str(bundle), *(word for name, value in options.items() for word in (f"--{name}", str(value))))
    return medians(out)


def medians(path: Path) -> dict[int, float]:
    return {cell.context: median(cell.samples) for cell in Results.load(path).cells if cell.kind == "decode"}


def in_turns(build: Path, bundle: Path, variant: str, folder: Path) -> list[dict[str, Any]]:
    """A row a context."""
    ways: dict[str, Callable[[Path, str, Path], dict[int, float]]] = {"cpp": partial(in_cpp, build), "python": in_python}
    turns = []
    for number in range(TURNS):
        order = list(ways) if number % 2 else list(reversed(ways))
        turns.append({name: ways[name](bundle, variant, folder / f"{variant}.{number}.{name}.json") for name in order})
    rows = []
    for context in turns[0]["cpp"]:
        found = {name: [turn[name][context] * 1e3 for turn in turns] for name in ways}
        ratio = statistics.median(a / b for a, b in zip(found["cpp"], found["python"], strict=True))
        row = {"variant": variant, "context": context, **{f"{name}_p50_ms": values for name, values in found.items()}}
        rows.append({**row, "ratio": ratio, "kept": ratio <= RATIO})
    return rows


def overhead(build: Path, bundle: Path, variant: str) -> dict[str, Any]:
    """Microseconds of a step and of Run alone, in turns in one process: the median over several processes."""
    costs = [
        json.loads(subprocess.run([build / "tests/step", bundle, variant], check=True, capture_output=True).stdout)
        for _ in range(TURNS)
    ]
    added = statistics.median(cost["step_us"] - cost["run_us"] for cost in costs)
    return {"variant": f"tiny {variant}", "added_us": added, "turns": costs, "kept": added < MICROSECONDS}


def main() -> None:
    out, checkpoint = Path(sys.argv[1]), sys.argv[2]
    build = Path(sys.argv[3]) if len(sys.argv) > 3 else ROOT / "build" / "runtime"
    refuse_existing(out)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.json").write_text(json.dumps(TINY))
        tiny = export(open_source(folder / "tiny.json"), folder / "tiny", ExportOptions(patterns=TINY_PATTERNS, cache="static"))
        for variant in tiny.variants:
            rows.append(overhead(build, tiny.path, variant.name))
            print(f"{rows[-1]['variant']}: a session adds {rows[-1]['added_us']:.1f} µs", flush=True)
        bundle = export(open_source(Path(checkpoint)), folder / "bundle", ExportOptions(patterns=PATTERNS))
        for variant in bundle.variants:
            for row in in_turns(build, bundle.path, variant.name, folder):
                rows.append(row)
                print(f"{row['variant']} at {row['context']} tokens: C++ {row['ratio']:.3f} × Python", flush=True)
    kept = all(row["kept"] for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "runtime", PROMISE, rows, kept, checkpoint=Path(checkpoint).name, samples=SAMPLES, turns=TURNS, tiny=TINY)


if __name__ == "__main__":
    main()
