"""A worker process in a runtime's own environment, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.errors import EngineError

ROOT = Path(__file__).parent.parent.parent


class WorkerError(EngineError):
    """One line with what the worker of the runtime `name` said, or how it ended."""

    def __init__(self, line: str, name: str = "") -> None:  # one argument is enough, as for every UserError
        super().__init__(line)
        self.name = name


class WorkerProcess:
    """`command` runs worker.py; what it prints goes to the end of the file `log`. All of it raises WorkerError."""

    def __init__(self, name: str, command: Sequence[str], log: Path, threads: int) -> None:
        self.name, self.log = name, log
        # Runtimes that make their threads before they are told how many, OpenMP's above all, are told here.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with open(log, "ab") as file:
            try:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environment, text=True, cwd=ROOT
                )
            except OSError as error:
                raise WorkerError(f"{name} does not start: {command[0]}: {error.strerror}", name) from None
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """One request, its answer."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._died() from None
        return self._answer()

    def close(self) -> None:
        """End the process, which frees all that the runtime holds; a second call does nothing."""
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(OSError):  # where it died, what it had not read
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            said = " ".join(answer["error"].split())[:300]
            raise WorkerError(f"{self.name}: {said}; what it printed: {self.log}", self.name)
        return answer

    def _died(self) -> WorkerError:
        return WorkerError(f"{self.name} ended with status {self.process.wait()}; what it printed: {self.log}", self.name)
