"""A benchmark's result on disk: what was promised, what was measured, on which machine, with which versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporter.files import write_text
from profiles.machine import fingerprint

PACKAGES = ("headpool", "torch", "onnxruntime", "onnx", "transformers", "numpy")


def save(out: Path, benchmark: str, promise: str, rows: Sequence[dict[str, Any]], kept: bool, **settings: Any) -> None:
    """Write `out`, which must not exist. `kept` says whether every row keeps the promise."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {
        "benchmark": benchmark,
        "promise": promise,
        "kept": kept,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dataclasses.asdict(fingerprint()),
        "versions": versions,
        "settings": settings,
        "rows": list(rows),
    }
    write_text(out, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
