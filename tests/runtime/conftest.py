"""runtime/ built once for all tests of this folder, in build/runtime, and loaded."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from building import REPOSITORY, lacking, run
from capi import Api


@pytest.fixture(scope="session")
def tools() -> dict[str, str]:
    """cmake and ctest, and the environment that scripts/cpp_deps takes ONNX Runtime's wheel from."""
    beside = shutil.which("cmake", path=str(Path(sys.executable).parent))  # from PyPI, as scripts/ops installs it
    cmake = shutil.which("cmake") or beside
    if not cmake or shutil.which(os.environ.get("CXX", "c++")) is None:
        lacking("cmake and a C++ compiler; scripts/ops says how to get them")
    done = subprocess.run(
        [REPOSITORY / "scripts/cpp_deps", "--runtime"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.returncode:
        lacking(f"what scripts/cpp_deps fetches: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return {"cmake": cmake, "ctest": str(Path(cmake).with_name("ctest")), "deps": done.stdout.splitlines()[-1]}


@pytest.fixture(scope="session")
def build(tools: dict[str, str]) -> Callable[..., Path]:
    """A function of a folder and CMake options that configures and builds runtime/ there, without a warning."""

    def make(folder: Path, *options: str) -> Path:
        folder.parent.mkdir(exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:  # of the tests' other processes
            fcntl.flock(lock, fcntl.LOCK_EX)
            prefix = f"-DCMAKE_PREFIX_PATH={tools['deps']}"
            run(tools["cmake"], "-S", REPOSITORY / "runtime", "-B", folder, prefix, *options)
            output = run(tools["cmake"], "--build", folder, "--parallel", "2")
        assert "warning:" not in output, output
        return folder

    return make


@pytest.fixture(scope="session")
def built(build: Callable[..., Path]) -> Path:
    return build(REPOSITORY / "build/runtime")


@pytest.fixture(scope="session")
def api(built: Path) -> Api:
    return Api(built / "src/libheadpool.so")


@pytest.fixture(scope="session")
def fake(built: Path) -> Api:
    """The same with TensorRT's backends computed by ONNX Runtime (runtime/tests/fake_tensorrt.cpp)."""
    return Api(built / "tests/libheadpool_fake.so")
