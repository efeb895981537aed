"""The suite's parent: steps one after another, each in a process with a time limit. Standard library only.

What it needs is on a bare machine: everything else is imported by the steps' own processes, after the wheels are in place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from profiles.gpu import wheels
from profiles.gpu.steps import STEPS, Step, chosen

ROOT = Path(__file__).resolve().parents[2]
LEAST = 10.0  # seconds: no step is begun with less left

EPILOG = """\
steps, in order, with the most seconds each may take (the time that is left bounds them too):
{steps}

what a step leaves in OUT:
  steps.json           what became of each step: done, skipped or failed, why, and what it found
  MODEL-BACKEND.json   every sample, as `headpool report` and `headpool compare` read it; written after each context
  report-MODEL.html    one page a model
  log.txt              all that the steps printed
A step that fails, hangs or crashes costs no other. The exit code is 1 where one failed, or nothing was measured.

wheels that a bare machine (Python 3.12, CUDA 13, torch, onnx, onnxscript, transformers) lacks:
{wheels}
`scripts/gpu_suite --pack DIR` downloads them and cuts them into trips: folders DIR/1, DIR/2, … of at most --piece MiB, what
most steps want first. Carry each trip's files into one folder of the GPU machine and name it with --wheels: pieces are joined
there (by hand: cat NAME.whl.part-* > NAME.whl) and installed without a network. Without a wheel, its backend's steps are
skipped.

examples:
  scripts/gpu_suite out --wheels wheels
  scripts/gpu_suite out --wheels wheels --work work --minutes 9 --steps torch,onnxruntime
  scripts/gpu_suite out2 --work work --minutes 9 --steps tensorrt-rtx,tensorrt        (same machine: bundles are kept)
  scripts/gpu_suite out --device cpu --shapes tiny                                    (the same code, in a minute)
"""


@dataclass
class Suite:
    """One run. `notes` is what steps.json holds: a record for each step, in order."""

    out: Path
    work: Path
    device: str
    shapes: str
    deadline: float  # of time.monotonic()
    notes: list[dict[str, Any]] = field(default_factory=list)

    def run(self, steps: tuple[Step, ...], environment: dict[str, str]) -> int:
        """Every step; the number of those that failed."""
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            for step in steps:
                reason = self.reason_to_skip(step, steps)
                skipped = {"status": "skipped", "reason": reason}
                self.note(step.name, skipped if reason else self.run_one(step, environment, log))
        return sum(note["status"] == "failed" for note in self.notes)

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Keep the record of a step, on disk at once, and say what became of it."""
        self.notes.append({"step": name, **record})
        partial = self.out / ".steps.json.partial"
        partial.write_text(json.dumps({"steps": self.notes}, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, self.out / "steps.json")
        seconds = f" in {record['seconds']:.0f} s" if "seconds" in record else ""
        why = record.get("reason") or record.get("error")
        print(f"{name:<42} {record['status']}{seconds}{': ' + why[:300] if why else ''}", flush=True)
        detail = record.get("detail") or {}
        for line in detail.get("cells", ()):
            print(f"    {line}", flush=True)

    def found(self, name: str) -> dict[str, Any]:
        """The record of a step that was run; empty where it was not."""
        return next((note for note in self.notes if note["step"] == name), {})

    def reason_to_skip(self, step: Step, steps: tuple[Step, ...]) -> str | None:
        missing = self.found("check").get("detail", {}).get("missing", {})
        export = self.found(f"export.{step.model}")
        if step.kind != "report" and self.deadline - time.monotonic() < LEAST:
            return "no time was left"
        if step.backend in missing:
            return str(missing[step.backend])
        if step.kind == "export":
            users = [other for other in steps if other.model == step.model and other.kind != "export"]
            if all(user.backend in missing or user.backend == "torch" for user in users):
                return "nothing that would run its graphs can run here"
        if step.backend not in ("", "torch") and export.get("status") in ("failed", "skipped"):
            return f"{export['step']} was {export['status']}"
        if step.kind == "breakdown" and self.found(step.name.replace("breakdown", "latency")).get("status") != "done":
            return "its latency was not measured"
        if step.kind == "report" and not any(self.out.glob("*-*.json")):
            return "there are no results"
        return None

    def run_one(self, step: Step, environment: dict[str, str], log: TextIO) -> dict[str, Any]:
        started, result = time.monotonic(), self.work / f".{step.name}.json"
        limit = min(step.seconds, max(self.deadline - started, LEAST))
        log.write(f"\n== {step.name} (at most {limit:.0f} s)\n")
        log.flush()
        result.unlink(missing_ok=True)
        arguments = [step.name, str(result), str(self.out), str(self.work), self.device, self.shapes]
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "profiles.gpu.child", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that a step's own processes end with it
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        record = {"seconds": round(time.monotonic() - started, 1)}
        if code is None:
            return {"status": "failed", **record, "error": f"it took more than {limit:.0f} s and was stopped"}
        try:
            found = json.loads(result.read_text("utf-8"))
        except (OSError, ValueError):
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return {"status": "failed", **record, "error": f"it ended by {how}; see {self.out / 'log.txt'}"}
        return {"status": "failed" if "error" in found else "done", **record, **found}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 where a step failed, 2 for a mistake, 130 when interrupted."""
    parser = _parser()
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if given.pack:
            wheels.pack(given.pack, given.piece)
            sys.exit(0)
        if given.out is None:
            raise ValueError("name the folder for the results: scripts/gpu_suite OUT")
        sys.exit(_suite(given))
    except KeyboardInterrupt:
        print("gpu_suite: interrupted; what was measured is in OUT", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"gpu_suite: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _suite(given: argparse.Namespace) -> int:
    steps = chosen(tuple(word for word in given.steps.split(",") if word))
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise ValueError(f"{given.out} exists and is no empty folder; choose another name or empty it")
    if given.wheels is not None and not given.wheels.is_dir():
        raise ValueError(f"--wheels {given.wheels} is not a folder")
    given.out.mkdir(parents=True, exist_ok=True)
    with _work(given.work) as work:
        suite = Suite(given.out.resolve(), work, given.device, given.shapes, time.monotonic() + 60 * given.minutes)
        site = work / "site"
        if given.wheels is not None and not site.exists():
            suite.note("install", wheels.install(given.wheels, site, suite.out / "log.txt"))
        failed = suite.run(steps, _environment(site))
        counts = {status: sum(note["status"] == status for note in suite.notes) for status in ("done", "failed", "skipped")}
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{len(suite.notes)} steps: {told}; results are in {given.out}", flush=True)
        missing = suite.found("check").get("detail", {}).get("missing", {})
        if not any(given.out.glob("*-*.json")) and any(step.kind == "latency" for step in steps):
            why = "; ".join(dict.fromkeys(missing.values())) or "see steps.json"
            print(f"gpu_suite: nothing was measured ({why}); --device cpu tries the suite", file=sys.stderr)
            return 1
        return 1 if failed else 0


@contextlib.contextmanager
def _work(folder: Path | None) -> Iterator[Path]:
    """The folder for bundles: the caller's, which is kept, or one that goes at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="gpu_suite-") as name:
        yield Path(name)


def _environment(site: Path) -> dict[str, str]:
    """Our code first, then the wheels; CUDA's libraries of torch's own wheels where ONNX Runtime and TensorRT find them."""
    paths = [str(ROOT), *([str(site)] if site.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    found = [Path(entry).glob(name) for entry in [*sys.path, str(site)] for name in ("nvidia/*/lib", "tensorrt_libs")]
    places = [str(path) for paths in found for path in sorted(paths)]
    libraries = [os.environ.get("LD_LIBRARY_PATH", ""), *places]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }


class _Parser(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu_suite: {message} (see scripts/gpu_suite --help)\n")


def _parser() -> argparse.ArgumentParser:
    steps = "\n".join(f"  {step.name:<42} {step.seconds:>4} s" for step in STEPS)
    parser = _Parser(
        prog="gpu_suite",
        description="On a bare GPU machine: check, export, compare tokens with torch at every number of KV heads, and measure "
        "a decode step of each backend that works there against the floor that its memory sets. JSON and pages into OUT.",
        epilog=EPILOG.format(steps=steps, wheels=wheels.table()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder for the results: new, or empty")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels, or of pieces of them, to install first")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for bundles and engines, kept; else a temporary one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: torch and ONNX Runtime there")
    parser.add_argument("--shapes", choices=("full", "tiny"), default="full", help="tiny: two small layers, to try the suite")
    parser.add_argument("--steps", default="", metavar="A,B,…", help="only these steps, by name or a part: onnxruntime")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all steps (default: 9)")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="download the wheels into DIR, cut into trips, and end")
    parser.add_argument("--piece", type=int, default=52, metavar="MiB", help="most of one trip (default: 52)")
    return parser
