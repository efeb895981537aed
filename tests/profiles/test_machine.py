from __future__ import annotations

import subprocess

import pytest

from profiles import machine


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    for name in ("exporter", "profiles/results", "demo"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "commit", "-qm", "one")
    return tmp_path


def test_the_commit_and_whether_the_code_is_it(checkout):
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert machine.checkout(checkout) == {"commit": head, "tree": "clean"}
    (checkout / "profiles/results/a.py").write_text("a new measurement\n")
    (checkout / "demo/b.py").write_text("not code of ours\n")
    assert machine.checkout(checkout)["tree"] == "clean"
    (checkout / "exporter/new.py").write_text("2\n")
    assert machine.checkout(checkout)["tree"] == "dirty"


def test_elsewhere_there_is_no_commit(checkout, tmp_path_factory, monkeypatch):
    assert machine.checkout(checkout / "exporter") == {}  # an environment inside a checkout of something else
    empty = tmp_path_factory.mktemp("empty")
    (empty / ".git").mkdir()
    assert machine.checkout(empty) == {}
    monkeypatch.setenv("PATH", "")
    assert machine.checkout(checkout) == {}


def test_versions_name_what_makes_the_graphs():
    assert {"python", "headpool", "torch", "onnx", "onnxruntime", "numpy"} <= set(machine.versions())
