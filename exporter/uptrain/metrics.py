"""The figures of a run: a JSON object a line, and the same for TensorBoard where tensorboardX is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from exporter.errors import UserError
from exporter.files import replacing

JSON, BOARD = "metrics.jsonl", "runs"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows so far, by step; not a last one that was cut short. Raises UserError."""
    path = folder / JSON
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); remove {folder} to begin anew") from None


class Metrics:
    """Appends rows to a run's folder. What an interrupted call wrote of steps behind its last checkpoint is dropped first."""

    def __init__(self, folder: Path, step: int) -> None:
        rows = read_metrics(folder)
        kept = [json.dumps(row) + "\n" for row in rows if 0 < step >= row["step"]]  # from the start on, step 0 is written anew
        with replacing(folder / JSON) as temporary:
            temporary.write_text("".join(kept), "utf-8")
        self._file = open(folder / JSON, "a", encoding="utf-8")  # noqa: SIM115
        self._board: Any = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / BOARD), purge_step=step + bool(step) if rows else None)

    def write(self, row: dict[str, Any]) -> None:
        """`row` has numbers only; its `step` counts the steps done."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
