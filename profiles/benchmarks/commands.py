"""How long a newcomer waits: `headpool --help`, `./scripts/test` and `./scripts/demo`, in a fresh clone of this repository.

Promises: --help in under 0.5 s, the median of ten; the test and the demo under 10 minutes each on two cores, once the
environment is there, which is a row of its own (it is mostly downloads).

    python -m profiles.benchmarks.commands OUT.json FOLDER    FOLDER, the clone, stays: what the demo measured is in its demo/
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from profiles.benchmarks.record import save
from profiles.machine import ROOT

HELP_RUNS = 10
HELP_SECONDS, SCRIPT_SECONDS = 0.5, 600
PROMISE = f"--help ≤ {HELP_SECONDS} s; ./scripts/test and ./scripts/demo ≤ {SCRIPT_SECONDS // 60} minutes each"


def seconds(command: str, folder: Path, log: Path) -> float:
    """Of one run that succeeds; what it prints goes to `log`."""
    newcomers = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = time.perf_counter()
    with open(log, "wb") as file:
        outputs: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        subprocess.run(command.split(), cwd=folder, env=newcomers, check=True, **outputs)
    return time.perf_counter() - start


def row(command: str, seconds: list[float], limit: float | None = None) -> dict[str, Any]:
    median = statistics.median(seconds)
    found = {"command": command, "median_seconds": median, "seconds": seconds, "limit": limit}
    print(f"{command}: {median:.2f} s", flush=True)
    return {**found, "kept": limit is None or median <= limit}


def main() -> None:
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    logs = {name: Path(f"{folder}.{name}.log") for name in ("setup", "help", "test", "demo")}
    rows = [row("scripts/setup", [seconds("scripts/setup", folder, logs["setup"])])]
    help_command = ".venv/bin/headpool --help"
    rows.append(row(help_command, [seconds(help_command, folder, logs["help"]) for _ in range(HELP_RUNS)], HELP_SECONDS))
    for name in ("test", "demo"):
        rows.append(row(f"scripts/{name}", [seconds(f"scripts/{name}", folder, logs[name])], SCRIPT_SECONDS))
    print(*logs["test"].read_text().splitlines()[-3:], sep="\n")
    kept = all(row["kept"] for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "commands", PROMISE, rows, kept)


if __name__ == "__main__":
    main()
