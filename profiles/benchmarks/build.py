"""What a TensorRT for RTX engine costs to build on a machine without a GPU.

Promise: SmolLM2-135M (fp16, G = 9, 3, 1) and four layers of Llama-3.1-8B's shape (random weights: equal ones are stored once)
build, verified, in at most 120 s each and in at most 2.5 × the bytes of their weights in memory. That is memory of its own,
without pages of files, which can be dropped whenever it is short; all that is resident, 94 MB of TensorRT's code among it,
stands beside.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle
from profiles.benchmarks.export import LLAMA_8B
from profiles.benchmarks.process import headpool
from profiles.benchmarks.record import save

PROMISE = "SmolLM2 (fp16, G = 9, 3, 1) and 4 layers of 8B shape build in ≤ 120 s and ≤ 2.5 × their weights in own memory"
TARGETS = "sm86,sm89,sm120"
LAYERS = {**LLAMA_8B, "num_hidden_layers": 4}


def build(bundle: Path, variant: str, *options: str) -> dict[str, Any]:
    """One engine: what it cost, and what was verified."""
    cost = headpool("build", str(bundle), "--variant", variant, "--target", TARGETS, "--json", *options)
    engine = json.loads(cost.output.splitlines()[-1])["engines"][0]
    memory = {"own_bytes": cost.own_bytes, "peak_bytes": cost.peak_bytes}
    return {"seconds": cost.seconds, **memory, "engine_bytes": engine["bytes"], **engine["network"]}


def rows_of(what: str, bundle: Path, *options: str) -> list[dict[str, Any]]:
    rows = []
    for variant in Bundle.open(bundle).variants:
        sizes = {name: (bundle / name).stat().st_size for name in variant.weights}
        cost = build(bundle, variant.name, *options)
        weights = sum(sizes.values())
        ratios = {"own_ratio": cost["own_bytes"] / weights, "peak_ratio": cost["peak_bytes"] / weights}
        row = {"what": what, "variant": variant.name, "options": list(options), "weight_bytes": weights, **cost, **ratios}
        rows.append({**row, "kept": cost["seconds"] <= 120 and ratios["own_ratio"] <= 2.5})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    out, checkpoint = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as name:
        folder = Path(name)
        (folder / "8b.json").write_text(json.dumps(LAYERS))
        made = {
            "SmolLM2-135M": (checkpoint, "--groups", "9,3,1"),
            "4 layers, 8B": (str(folder / "8b.json"),),
        }
        rows = []
        for what, (source, *options) in made.items():
            bundle = folder / what.split()[0]
            headpool("export", source, str(bundle), "--pattern", "attention", "--dtype", "fp16", *options)
            rows += rows_of(what, bundle)
    kept = all(row["kept"] for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "build", PROMISE, rows, kept, targets=TARGETS, shape=LAYERS)


if __name__ == "__main__":
    main()
