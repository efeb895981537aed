"""The wheel, built and installed outside the repository, holds the three packages and works from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("exporter", "graphs", "profiles")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because setuptools leaves its working files beside the sources."""
    copy, out = tmp_path_factory.mktemp("source") / "headpool", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, copy)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", site, wheel)
    return site


def pip(*arguments: str | Path) -> None:
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)])


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def headpool(site: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return run([str(site / "bin" / "headpool"), *arguments], cwd=cwd, env=environment)


def test_contents(wheel):
    """Every module of the three packages and what describes them; no test, no script, no measured result."""
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    operators = "exporter/engines/libheadpool_ops.so"
    sources |= {operators} if (ROOT / operators).is_file() else set()  # where scripts/ops has built it
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        described = {name for name in names if ".dist-info/" in name}
        [license_name] = [name for name in described if name.endswith("/licenses/LICENSE")]
        assert archive.read(license_name).decode() == (ROOT / "LICENSE").read_text("utf-8")
    assert names - described == sources


def test_works_outside_the_repository(installed, tmp_path):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = "import exporter, graphs, profiles; print(exporter.__file__, graphs.__file__, profiles.__file__)"
    for file in run([sys.executable, "-c", where], cwd=tmp_path, env=environment).split():
        assert Path(file).is_relative_to(installed)

    assert headpool(installed, tmp_path, "--version").strip().endswith(version)
    assert "sweep" in headpool(installed, tmp_path, "--help")
    checks = json.loads(headpool(installed, tmp_path, "doctor", "--json").splitlines()[-1])["checks"]
    assert {check["what"]: check["ok"] for check in checks}["ONNX Runtime on the CPU"]

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    headpool(installed, tmp_path, "export", "config.json", "bundle", "--groups", "2")
    generated = headpool(installed, tmp_path, "run", "bundle", "--tokens", "5,7,11", "--max-new-tokens", "4", "--json")
    assert json.loads(generated.splitlines()[-1])
