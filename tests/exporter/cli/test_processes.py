"""The command line as a process: interrupts, pipes, terminals, file names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# A shell that starts the tests in the background has them ignore SIGINT, and so would what they start.
DEFAULT_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
HEADPOOL = [sys.executable, "-c", f"{DEFAULT_SIGINT}; from exporter.__main__ import main; main()"]


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def start(*arguments: Any, **keywords: Any) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*HEADPOOL, *map(str, arguments)], env=environment, **{**pipes, **keywords})


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A config whose weights take seconds to draw and write."""
    path = tmp_path_factory.mktemp("slow") / "config.json"
    sizes = {"vocab_size": 150_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
    config = {"model_type": "llama", "num_attention_heads": 6, "max_position_embeddings": 512, **sizes}
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("sign", "command"), [("SIGINT", "export"), ("SIGTERM", "export"), ("SIGINT", "sweep")])
def test_an_interrupt_leaves_nothing(sign: str, command: str, slow: Path, made: Path, tmp_path: Path) -> None:
    """In the middle of writing weights, and of measuring."""
    endless = ["--groups", "2", "--samples", "100000000", "--contexts", "4", "--kinds", "decode"]
    process = start(
        command, *([slow, tmp_path / "out"] if command == "export" else [made / "model", tmp_path / "out", *endless])
    )
    inside = "*/*" if command == "export" else "*/bundle/headpool.json"
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(inside)) and not list(tmp_path.glob("." + inside)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(getattr(signal, sign))
    code, out, err = finished(process)
    assert (code, out) == (130, "")
    assert err.strip() == "headpool: interrupted; nothing half-written was left"
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_modules_are_imported() -> None:
    kill = "lambda name, *_: os.kill(os.getpid(), signal.SIGINT) if name == 'exporter.cli' else None"
    finder = f"import os, sys; sys.meta_path.insert(0, type('Finder', (), {{'find_spec': staticmethod({kill})}}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{finder}; {DEFAULT_SIGINT}; from exporter.__main__ import main; main()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "headpool: interrupted; nothing half-written was left\n"


def test_a_reader_that_goes_away_and_a_full_output(made: Path) -> None:
    process = start("run", made / "bundle", "--prompt", "a", "--max-new-tokens", "100")
    process.stdout.close()  # type: ignore[union-attr]  # long before the first token: later, all might be written already
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    assert process.wait(60) == 141  # as a shell says of a program that SIGPIPE ended
    with open("/dev/full", "w") as full:
        code, _, err = finished(start("inspect", made / "model", stdout=full))
    assert code == 2
    assert err.startswith("headpool: No space left on device\n")
    assert "Traceback" not in err


def test_terminals_that_cannot_write_arrows(made: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [*HEADPOOL, "convert", str(made / "model"), str(tmp_path / "out"), "--groups", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 \\u2192 1 KV heads" in done.stdout


def test_names_that_are_not_unicode(headpool, refused, made: Path, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"m\xff")
    shutil.copytree(made / "model", model)
    assert "is not Unicode text; give the file or folder another name" in refused("export", model, "out")
    assert headpool("convert", made / "model", tmp_path / os.fsdecode(b"o\xff"), "--groups", "1")[0] in (0, 2)
