"""Two processes that torchrun starts, over Gloo: the same losses as one; and one of them dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from exporter.uptrain import state
from exporter.uptrain.metrics import read_metrics

ROOT = Path(__file__).parents[3]
DYING = """
import os, signal
from exporter.cli import main
from exporter.uptrain.trainer import Trainer
step = Trainer.step
def dying(self, number):
    if number == 5 and self.group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
Trainer.step = dying
main()
"""


ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def pair(*arguments: object) -> list[tuple[int, str, str]]:
    """Two processes in the environment that torchrun makes, but without it: it would kill the second when the first dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


COMMON = {"steps": 8, "train": "all", "optimizer": "adafactor", "micro_batch": 1, "checkpointing": True, "save_every": 2}


@pytest.fixture
def arguments(saved, text) -> list[str]:
    """COMMON and what the fixture `few` gives, for the command line, with the model as its own teacher."""
    few = ["--batch", "4", "--window", "24", "--lr", "3e-3", "--dtype", "fp32", "--held-out", "3", "--data", str(text)]
    common = ["--steps", "8", "--optimizer", "adafactor", "--micro-batch", "1", "--checkpointing", "--save-every", "2"]
    return [*few, *common, "--teacher", str(saved)]


def close(one: Path, other: Path) -> None:
    """The figures of every step, and the weights: gradients are summed in another order, and each step adds to that."""
    rows = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(9))
    for mine, theirs in zip(*rows, strict=True):
        for name in mine.keys() - {"seconds", "tokens_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (name, mine["step"])
    weights = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 2e-4, name


def test_two_processes_train_as_one_and_go_on_when_one_dies(saved, run, arguments, tmp_path) -> None:
    alone = run("alone", **COMMON, teacher=str(saved))
    code, out, err = torchrun("-m", "exporter", "uptrain", saved, tmp_path / "two", *arguments)
    assert code == 0, err
    assert out.count(" steps, ") == 1
    assert "Warning" not in err
    close(alone, tmp_path / "two")

    (tmp_path / "dying.py").write_text(DYING)
    survivor, dead = pair(tmp_path / "dying.py", "uptrain", saved, tmp_path / "died", *arguments)
    folder = tmp_path / "died.run"
    lost = f"a process of the run died or was lost; the same command goes on from step 4, the last kept in {folder}"
    assert (survivor[:2], dead[0]) == ((2, ""), -9)
    assert survivor[2].endswith(f"headpool: {lost}\n")
    assert "Traceback" not in survivor[2]
    assert not (tmp_path / "died").exists()
    assert state.latest(folder) == 4
    close(alone, run("died", **COMMON, teacher=str(saved)))  # by one process what two began
