"""How many threads a session gets, by made-up folders of /proc and /sys; tests/runtime holds the C++ runtime to the same."""

from __future__ import annotations

import os
from pathlib import Path

import cgroups
import pytest

from exporter.engines.cores import cpu_quota, physical_cores


@pytest.mark.parametrize("case", cgroups.CASES)
def test_the_cpus_of_a_cgroup(case: str, tmp_path: Path) -> None:
    files, cpus = cgroups.CASES[case]
    assert cpu_quota(cgroups.write(files, tmp_path)) == cpus


def test_threads_are_one_a_core_within_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5}, raising=False)
    cgroups.write(cgroups.topology({0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2"}), tmp_path)
    assert physical_cores(tmp_path) == 4  # 0 and 4, 1 and 5, 2, and 3, of which nothing is known
    cgroups.write({"proc/self/cgroup": cgroups.ALONE, cgroups.MAX: "250000 100000"}, tmp_path)
    assert physical_cores(tmp_path) == 3
    cgroups.write({cgroups.MAX: "6400000 100000"}, tmp_path)
    assert physical_cores(tmp_path) == 4


def test_threads_of_this_machine() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
