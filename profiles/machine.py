"""What a figure was measured on: the machine, the versions, and the very code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil

from exporter.engines.cores import physical_cores
from exporter.engines.operators import operator_library
from exporter.errors import EngineError
from profiles.results import Machine

PACKAGES = (
    "headpool",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "transformers",
    "numpy",
)
CODE = ("exporter", "graphs", "profiles", "runtime", "pyproject.toml", ":(exclude)profiles/results")  # what can change a figure
ROOT = Path(__file__).resolve().parent.parent

# What decides the speed of a matrix product or of a conversion between dtypes on x86-64 and Arm.
# fmt: off
FLAGS = (
    "fma", "f16c", "avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "amx_fp16", "neon", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme",
)
# fmt: on


def fingerprint() -> Machine:
    """The machine this process runs on. What cannot be found out is "", 0 or empty, never guessed."""
    return Machine(
        cpu=_cpu_info("model name") or platform.processor() or platform.machine(),
        cores=physical_cores(),
        cpus=_usable_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        l3_bytes=l3_bytes(),
        flags=tuple(flag for flag in FLAGS if flag in (_cpu_info("flags") or _cpu_info("Features")).split()),
        os=platform.platform(),
        gpus=_gpus(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def versions() -> dict[str, str]:
    """Python's, of each of PACKAGES that is installed, and where it is built a hash of headpool's operator library; where
    headpool runs from its git checkout, also the commit, and whether the code differs from it ("clean", "dirty")."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    with contextlib.suppress(EngineError):
        found["operators"] = "sha256:" + hashlib.sha256(operator_library().read_bytes()).hexdigest()[:16]
    return found | checkout(ROOT)


def checkout(root: Path) -> dict[str, str]:
    """ "commit" and "tree" of the git checkout whose top folder is `root`; empty where it is none, or git cannot say."""
    if not (root / ".git").exists():
        return {}
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *CODE)
    return {} if not commit or changes is None else {"commit": commit, "tree": "dirty" if changes else "clean"}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def l3_bytes() -> int:
    """Bytes of the largest cache the kernel reports for the first CPU; 0 where it reports none."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        number, unit = text.rstrip("KMG"), text.lstrip("0123456789")
        if number.isdigit():
            sizes.append(int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit, 0))
    return max(sizes)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _cpu_info(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _gpus() -> tuple[str, ...]:
    """ "name, driver, memory" of each NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
