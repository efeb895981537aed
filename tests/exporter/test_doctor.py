"""What doctor says works does, and what does not has a reason in whole words."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter import doctor
from exporter.engines.providers import INSTALL_CUDA
from exporter.engines.tensorrt.api import Api
from exporter.errors import EngineError
from graphs.patterns import PATTERNS


@pytest.fixture(scope="module")
def report():
    return doctor.diagnose()


def test_every_pattern_is_tried_with_every_dtype_and_cache_form(report) -> None:
    details = {check["what"]: check["detail"] for check in report["checks"]}
    forms = [f"{dtype} {cache}" for dtype in doctor.DTYPES for cache in ("static", "concat")]
    for pattern in PATTERNS:
        assert all(details[f"pattern {pattern} on the CPU"].count(form) == 1 for form in forms)


def test_reasons_are_short_and_whole(report) -> None:
    for line in doctor.render(report):
        assert "\n" not in line
        assert "ONNXRuntimeError" not in line
        assert "with na" not in line
    for pattern in ("repeat", "grouped", "attention", "gqa"):
        (detail,) = [c["detail"] for c in report["checks"] if c["what"] == f"pattern {pattern} on the CPU"]
        assert detail == "fp32 static, fp32 concat, fp16 static, fp16 concat; not bf16 static, bf16 concat (no kernel for bf16)"


def test_a_pattern_that_does_not_fit_says_why(monkeypatch) -> None:
    """The reason of its check, without the name of the node that was made up to try it."""
    monkeypatch.setattr(PATTERNS["repeat"], "check", lambda node: "its cache is static; repeat is concat" * node.static or None)
    (check,) = [check for check in doctor.diagnose()["checks"] if check["what"] == "pattern repeat on the CPU"]
    assert check["ok"]
    assert "; not fp32 static, fp16 static, bf16 static (its cache is static; repeat is concat)" in check["detail"]


def test_long_reasons_are_cut_after_a_word(monkeypatch) -> None:
    def fail(*_) -> None:
        raise EngineError("[ONNXRuntimeError] : 1 : FAIL : " + "something went wrong " * 20)

    monkeypatch.setattr(doctor, "_open", fail)
    checks = {check["what"]: check for check in doctor.diagnose()["checks"]}
    detail = checks["pattern gqa on the CPU"]["detail"]
    assert not checks["pattern gqa on the CPU"]["ok"]
    assert detail.startswith("not fp32 static, fp32 concat, fp16 static, fp16 concat, bf16 static, bf16 concat (something went")
    assert detail.endswith((" something …)", " went …)", " wrong …)"))
    assert len(detail) < 220


def test_memory_is_in_decimal_units(report) -> None:
    report = {**report, "machine": {**report["machine"], "memory_bytes": 25_300_000_000}}
    assert doctor.render(report)[0].endswith(" cores, 25.3 GB")


def test_tensorrt_uptrain_and_the_compiler_have_rows(report) -> None:
    names = [check["what"] for check in report["checks"]]
    for backend in ("tensorrt-rtx", "tensorrt"):
        assert f"{backend}: build" in names
        assert f"{backend}: run" in names
    assert {"uptrain: data of Hugging Face", "uptrain: TensorBoard files", "C++ compiler (scripts/ops)"} <= set(names)


def test_without_a_gpu_rtx_builds_for_named_chips_and_nothing_runs(monkeypatch) -> None:
    """Another TensorRT has no chips to name: it builds where it runs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for backend, chips in (("tensorrt-rtx", ("sm86", "sm120")), ("tensorrt", ())):
        kinds = SimpleNamespace(__members__=[chip.upper() for chip in chips])
        trt = SimpleNamespace(__name__="trt", ComputeCapability=kinds)
        monkeypatch.setattr(doctor, "load", lambda name, trt=trt: Api(name, trt, "1.2"))
        checks = {check["what"]: check for check in doctor.diagnose()["checks"]}
        build, run = checks[f"{backend}: build"], checks[f"{backend}: run"]
        gpu = "TensorRT engines run on an NVIDIA GPU: "
        assert (build["ok"], run["ok"]) == (bool(chips), False)
        assert build["detail"] == "trt 1.2, for sm86, sm120" if chips else build["detail"].startswith(gpu)
        assert run["detail"].startswith(gpu)


def test_what_is_missing_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    checks = {check["what"]: check["detail"] for check in doctor.diagnose()["checks"]}
    assert checks["C++ compiler (scripts/ops)"].startswith("no-such-compiler was not found; g++ from 12")
    assert checks["tensorrt-rtx: build"].endswith("pip install 'headpool[tensorrt-rtx]'")
    assert checks["ONNX Runtime on CUDA"].endswith(INSTALL_CUDA)


def test_the_advice_for_cuda_is_readmes() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert all(f"\n{command}" in readme for command in INSTALL_CUDA.split("; "))
