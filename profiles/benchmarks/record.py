"""A benchmark's result on disk: what was promised, what was measured, on which machine, with which versions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporter.files import write_text
from profiles.machine import fingerprint, versions
from profiles.results import Results


class Rows:
    """What a long benchmark has measured so far, one JSON object a line of a file: a run that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(row, flush=True)
        return row


def save(
    out: Path,
    benchmark: str,
    promise: str,
    rows: Sequence[dict[str, Any]],
    kept: bool,
    *,
    run: Results | None = None,
    **settings: Any,
) -> None:
    """Write `out`, which must not exist. `kept` says whether the promise is; `run` is a latency run that rows come from,
    which is written whole."""
    record = {
        "benchmark": benchmark,
        "promise": promise,
        "kept": kept,
        "created": run.created if run else datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dataclasses.asdict(run.machine if run else fingerprint()),
        "versions": run.versions if run else versions(),
        "settings": settings,
        "rows": list(rows),
    }
    if run:
        record["run"] = run.to_json()
    write_text(out, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
