"""What converting an 8B shape on tokens costs: Llama-3.1-8B's, fp16, sparse files of zeros, 8 → 2 KV heads by `optimal`.

Promise: at most 2 GB of memory besides the page cache, and an hour at most, both on two cores.

    python -m profiles.benchmarks.streaming OUT.json [FOLDER]

The result takes 16 GB of FOLDER's disk for a while.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from exporter.files import refuse_existing
from profiles.benchmarks.export import LLAMA_8B, write_sparse
from profiles.benchmarks.process import headpool
from profiles.benchmarks.record import save

GROUPS, METHOD, CALIBRATION = 2, "optimal", "random"
SECONDS, BYTES = 3600, 2e9
PROMISE = f"8B, 8 → {GROUPS} KV heads by {METHOD}: at most {BYTES / 1e9:g} GB and {SECONDS // 60} minutes"


def main() -> None:
    out = Path(sys.argv[1])
    refuse_existing(out)
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        source, converted = Path(folder) / "8b", Path(folder) / "out"
        write_sparse(source, LLAMA_8B)
        how = ("--groups", str(GROUPS), "--method", METHOD, "--calibration", CALIBRATION)
        cost = headpool("convert", str(source), str(converted), *how)
    kept = cost.own_bytes <= BYTES and cost.seconds <= SECONDS
    row = {"what": "8B", "seconds": cost.seconds, "own_bytes": cost.own_bytes, "peak_bytes": cost.peak_bytes, "kept": kept}
    print(row)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "streaming", PROMISE, [row], kept, shape=LLAMA_8B, groups=GROUPS, method=METHOD, calibration=CALIBRATION)


if __name__ == "__main__":
    main()
