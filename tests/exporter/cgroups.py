"""What Linux says of the CPU time of a process, in folders of our own: the files, and the CPUs they leave it, rounded up."""

from __future__ import annotations

from pathlib import Path

ALONE, NAMED = "0::/\n", "0::/kubepods/pod1/app\n"
FIRST = "3:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n1:cpuset:/\n0::/\n"  # of version 1
MAX, CPU = "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/cpu,cpuacct"

CASES: dict[str, tuple[dict[str, str], int]] = {
    "nothing is said": ({}, 0),
    "no limit": ({"proc/self/cgroup": ALONE, MAX: "max 100000\n"}, 0),
    "two of many": ({"proc/self/cgroup": ALONE, MAX: "200000 100000\n"}, 2),
    "a part is rounded up": ({"proc/self/cgroup": ALONE, MAX: "250000 100000\n"}, 3),
    "less than one": ({"proc/self/cgroup": ALONE, MAX: "5000 100000\n"}, 1),
    "another period": ({"proc/self/cgroup": ALONE, MAX: "200000 50000\n"}, 4),
    "no period": ({"proc/self/cgroup": ALONE, MAX: "200000\n"}, 0),
    "a period of nothing": ({"proc/self/cgroup": ALONE, MAX: "200000 0\n"}, 0),
    "the strictest above": (
        {
            "proc/self/cgroup": NAMED,
            "sys/fs/cgroup/kubepods/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/kubepods/pod1/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/kubepods/pod1/app/cpu.max": "max 100000\n",
        },
        3,
    ),
    "beside it": ({"proc/self/cgroup": NAMED, "sys/fs/cgroup/other/cpu.max": "100000 100000\n"}, 0),
    "names of the host": ({"proc/self/cgroup": NAMED, MAX: "200000 100000\n"}, 2),
    "version 1": (
        {
            "proc/self/cgroup": FIRST,
            f"{CPU}/docker/1/cpu.cfs_quota_us": "150000\n",
            f"{CPU}/docker/1/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1 in a container": (
        {"proc/self/cgroup": FIRST, f"{CPU}/cpu.cfs_quota_us": "400000\n", f"{CPU}/cpu.cfs_period_us": "100000\n"},
        4,
    ),
    "version 1, no limit": (
        {"proc/self/cgroup": FIRST, f"{CPU}/cpu.cfs_quota_us": "-1\n", f"{CPU}/cpu.cfs_period_us": "100000\n"},
        0,
    ),
    "of another controller": (
        {
            "proc/self/cgroup": "1:cpuset:/\n",
            "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpuset/cpu.cfs_period_us": "100000\n",
        },
        0,
    ),
}


def write(files: dict[str, str], root: Path) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def topology(siblings: dict[int, str]) -> dict[str, str]:
    """The files that say which threads a CPU shares its core with."""
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{text}\n" for cpu, text in siblings.items()}
