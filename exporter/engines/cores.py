"""How many threads a session gets that is not told: as runtime/src/cores.cpp counts them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil


def physical_cores(root: Path = Path("/")) -> int:
    """Cores this process may use, at least 1: hyper-threads not counted, as both threads of a core share the units that
    attention needs, and no more than its cgroups' CPU time (`root` has proc and sys)."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpu, root) for cpu in os.sched_getaffinity(0)})
    quota = cpu_quota(root)
    return max(1, min(cores, quota) if quota else cores)


def cpu_quota(root: Path = Path("/")) -> int:
    """CPUs' worth of time that the cgroups of this process (version 2 or 1) leave it, rounded up; 0 where they set no limit.

    A cgroup is also bound by those above it. In a container their names may be those of the host, of which only the last one
    above, the container's own, is mounted.
    """
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = [name for name in path.split("/") if name]
        for depth in range(len(names) + 1):
            folder = top.joinpath(*names[:depth])
            if controllers:
                words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                words = _text(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # not "max 100000", nor -1 and 100000
                quotas.append(math.ceil(int(words[0]) / int(words[1])))
    return min(quotas, default=0)


def _siblings(cpu: int, root: Path) -> str:
    """The threads of its core, or itself where that is not known."""
    return _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
