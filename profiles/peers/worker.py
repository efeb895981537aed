"""The other end of process.py, in a runtime's environment: `python -m profiles.peers.worker MODULE`, JSON lines in and out.

    {"do": "export", "checkpoint": …, "out": …, "weights": "fp32"}  →  {}
    {"do": "open", "model": …, "batch": …, "capacity": …, …}        →  {"versions": …, "options": …}
    {"do": "feed", "tokens": [[…], …]}                               →  {"logits": [[…], …]}
    {"do": "rewind", "length": n}                                    →  {}
    {"do": "prefill", "tokens": [[…], …]}                            →  {"prefill": s, "ttft": s}, from an empty cache
    {"do": "steps", "tokens": […], "settle": s, "count": n}          →  {"seconds": […]}, n steps after s untimed ones

Tokens are a list for each sequence, all of one length; those of steps one token a sequence, which every step feeds. Whatever
goes wrong is answered by {"error": "…"}. Between a request and the next, the process waits in a read.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from profiles.peers.runner import Runner

Clock = Callable[[], float]


class Worker:
    """Answers requests by one runtime's module: its `export`, and its class `Peer`, a Runner."""

    def __init__(self, module: Any, clock: Clock = time.perf_counter) -> None:
        self.module, self.clock = module, clock
        self.runner: Runner | None = None
        self.length = 0  # of the sequences, as the other end knows it
        self.grown = 0  # tokens of steps beyond it that are not forgotten yet

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        what = request.pop("do")
        if what == "export":
            self.module.export(Path(request["checkpoint"]), Path(request["out"]), request["weights"])
            return {}
        if what == "open":
            self.runner = self.module.Peer(Path(request.pop("model")), **request)
            return {"versions": self.runner.versions, "options": self.runner.options}
        runner = self.runner
        assert runner, f"{what} before open"
        if what == "steps":
            return {"seconds": self._steps(runner, request["tokens"], request["settle"], request["count"])}
        if what == "feed":
            logits = self._feed(runner, request["tokens"])
            return {"logits": logits.tolist()}
        if what == "rewind":
            self._rewind(runner, request["length"])
            return {}
        assert what == "prefill", what
        return self._prefill(runner, request["tokens"])

    def _feed(self, runner: Runner, tokens: list[list[int]]) -> np.ndarray:
        if self.grown:
            self._rewind(runner, self.length)
        logits = runner.feed(np.array(tokens, np.int64))
        self.length += len(tokens[0])
        return logits

    def _rewind(self, runner: Runner, length: int) -> None:
        runner.rewind(length)
        self.length, self.grown = length, 0

    def _prefill(self, runner: Runner, tokens: list[list[int]]) -> dict[str, float]:
        self._rewind(runner, 0)
        prompt = np.array(tokens, np.int64)
        start = self.clock()
        logits = runner.feed(prompt)
        filled = self.clock()
        np.argmax(logits, axis=-1)
        chosen = self.clock()
        self.length = prompt.shape[1]
        return {"prefill": filled - start, "ttft": chosen - start}

    def _steps(self, runner: Runner, tokens: list[int], settle: int, count: int) -> list[float]:
        """As in real decoding the sequences grow by a token a step; then they are as long as before, or, where the runtime
        cannot forget at little cost, once they have grown by its slack."""
        fed, seconds = np.array(tokens, np.int64)[:, None], []
        for _ in range(settle):
            runner.feed(fed)
        for _ in range(count):
            start = self.clock()
            runner.feed(fed)
            seconds.append(self.clock() - start)
        self.grown += settle + count
        if self.grown > runner.slack * self.length:
            self._rewind(runner, self.length)
        return seconds


def main(name: str) -> None:
    """Serve until the pipe is closed. A runtime that prints to stdout prints to stderr: stdout carries the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        worker = Worker(importlib.import_module(name))
        answers.write('{"ready": true}\n')
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    finally:
        answers.flush()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # of any kind: the runtimes have their own, and the other end has to hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        if worker.runner and gc.isenabled():
            gc.collect()
            gc.disable()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
