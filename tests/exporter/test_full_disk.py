"""A disk that fills up at any byte: one line, exit code 2, nothing left behind.

Once with the real writers on a file system that counts bytes and then says ENOSPC, at many sizes; and once on real tmpfs of a
few sizes, which takes a mount namespace.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hf
import pytest

from exporter.cli import _run

COMMANDS = {"export": ["--groups", "2,1", "--pattern", "grouped,gqa"], "convert": ["--groups", "1"]}
SMALL = "No space left on device"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = hf.save("llama", tmp_path_factory.mktemp("model"))
    hf.add_tokenizer(folder)
    return folder


class Disk:
    """What is opened for writing under `folder` shares `room` bytes; who needs more gets a short write and then ENOSPC."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room, self.written, self.open = str(folder), room, 0, io.open

    def __call__(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+") or not os.fsdecode(file).startswith(self.folder):
            return self.open(file, mode, buffering, *rest, **options)
        buffered = io.BufferedWriter(_File(self, os.fsdecode(file), mode.replace("b", "").replace("t", "")))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest[:1], **options)


class _File(io.FileIO):
    def __init__(self, disk: Disk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self.disk = disk

    def write(self, data: Any) -> int:
        count = min(memoryview(data).nbytes, self.disk.room - self.disk.written)
        if not count and memoryview(data).nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.disk.written += count
        return super().write(memoryview(data).cast("B")[:count])


def on_disk(room: int, command: str, model: Path, folder: Path, monkeypatch, capfd) -> tuple[int, str, int]:
    """Exit code, stderr, and how many bytes were written."""
    disk = Disk(folder, room)
    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", disk)
        patched.setattr(io, "open", disk)  # what pathlib calls
        code = _run([command, str(model), str(folder / "out"), *COMMANDS[command]])
    return code, capfd.readouterr().err, disk.written


@pytest.mark.parametrize("command", COMMANDS)
def test_wherever_it_fills_up(command: str, model: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    code, _, size = on_disk(1 << 40, command, model, whole, monkeypatch, capfd)
    on_disk_bytes = sum(path.stat().st_size for path in (whole / "out").iterdir())
    assert (code, size) == (0, on_disk_bytes), "some file was written past the counted disk"
    for room in (0, 1, *(size * part // 24 for part in range(1, 24)), size - 1):
        code, err, _ = on_disk(room, command, model, tmp_path, monkeypatch, capfd)
        assert code == 2, room
        assert err.count("\n") == 1
        assert err.startswith(f"headpool: {tmp_path}/out")
        assert SMALL in err
        assert os.listdir(tmp_path) == ["whole"], room


# Run as the only process of a mount namespace: mounts a tmpfs of each size (KiB) and runs each command on it.
IN_A_NAMESPACE = """
import contextlib, io, json, os, subprocess, sys
from exporter.cli import _run
disk, sizes, commands = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
results = []
for size in sizes:
    for command in commands:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], check=True)
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = _run(command)
        results.append([command[0], size, code, err.getvalue(), os.listdir(disk)])
        subprocess.run(["umount", disk], check=True)
print(json.dumps(results))
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def test_on_a_real_one(model: Path, tmp_path: Path) -> None:
    probe = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=4k", "none", str(tmp_path)]
    try:
        subprocess.run(probe, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        # Not silent: pytest lists warnings and, with -rs, skips.
        warnings.warn(f"no mount namespace here, so a real full disk was not tried: {error}", stacklevel=1)
        # To mount a disk of a few KiB takes root, or a kernel that lets users make namespaces; the counted disk above does not.
        pytest.skip(f"a full disk needs a mount namespace: {error}")
    commands = [[name, str(model), str(tmp_path / "out"), *words] for name, words in COMMANDS.items()]
    arguments = [sys.executable, "-c", IN_A_NAMESPACE, str(tmp_path), json.dumps([4, 64, 110, 4096]), json.dumps(commands)]
    done = subprocess.run([*UNSHARE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 8
    for name, size, code, err, left in results:
        if size == 4096:
            assert (code, left) == (0, ["out"]), (name, err)
        else:
            assert (code, left) == (2, []), (name, size, err)
            assert err.startswith(f"headpool: {tmp_path}/out")
            assert err.count("\n") == 1
            assert SMALL in err
