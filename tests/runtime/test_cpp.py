"""The C++ tests of runtime/, built and run: kernels against double precision, and no code shared between instruction sets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def lacking(what: str) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the C++ tests need {what}")


def test_cpp(tmp_path: Path) -> None:
    beside = shutil.which("cmake", path=str(Path(sys.executable).parent))  # from PyPI, as scripts/ops installs it
    cmake = shutil.which("cmake") or beside
    headers = [Path(os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "/nowhere")), REPOSITORY / ".deps/onnxruntime/include"]
    headers += [Path(root, "include", name) for root in ("/usr", "/usr/local") for name in ("onnxruntime", "")]
    include = next((folder for folder in headers if (folder / "onnxruntime_cxx_api.h").is_file()), None)
    if cmake is None or shutil.which(os.environ.get("CXX", "c++")) is None or include is None:
        lacking("cmake, a C++ compiler and ONNX Runtime's headers, which scripts/ops fetches")
    for command in (
        [cmake, "-S", REPOSITORY / "runtime", "-B", tmp_path, f"-DONNXRUNTIME_INCLUDE_DIR={include}"],
        [cmake, "--build", tmp_path, "--parallel", "2"],
        [Path(cmake).with_name("ctest"), "--test-dir", tmp_path, "--output-on-failure"],
    ):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stderr + done.stdout
    assert "100% tests passed" in done.stdout
    assert "no_shared_symbols_plain" in done.stdout
