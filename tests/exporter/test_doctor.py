"""What doctor says works does, and what does not has a reason in whole words."""

from __future__ import annotations

import pytest

from exporter import doctor
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
