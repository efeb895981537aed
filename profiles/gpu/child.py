"""One step in a process of its own: python -m profiles.gpu.child STEP RESULT.json OUT WORK DEVICE SHAPES."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from profiles.gpu.place import Place
from profiles.gpu.steps import BACKENDS, STEPS, Step
from profiles.machine import fingerprint, versions


def check(place: Place) -> dict[str, Any]:
    """The machine, its software, and which backends cannot run here: {"missing": {backend: reason}}."""
    missing: dict[str, str] = {}
    for backend in BACKENDS:
        try:
            _need(backend, place.device)
        except Exception as error:  # the reason is the answer
            missing[backend] = " ".join(str(error).split())[:300] or type(error).__name__
    return {"missing": missing, "machine": dataclasses.asdict(fingerprint()), "versions": versions()}


def _need(backend: str, device: str) -> None:
    """Raises with the reason why `backend` cannot run on `device`."""
    from exporter.doctor import check_provider
    from exporter.engines import BACKENDS as SESSIONS
    from exporter.engines.tensorrt.api import load
    from exporter.engines.tensorrt.device import missing
    from profiles.gpu.latency import backend_name

    if device == "cpu":
        if "tensorrt" in backend:
            raise RuntimeError(f"{backend} runs on a GPU only, not on --device cpu")
        return
    if (why := missing()) is not None:
        raise RuntimeError(f"no GPU: {why}")
    if backend.startswith("onnxruntime"):
        check_provider(SESSIONS[backend_name(backend, device)].options["provider"])
    elif backend != "torch":
        load(backend)


def report(place: Place) -> dict[str, Any]:
    """One page for each model that was measured."""
    from profiles.report import write_report

    pages = [write_report(results, place.out / f"report-{model}.html") for model, results in place.by_model().items()]
    return {"pages": [page.name for page in pages]}


def _run(step: Step, place: Place) -> dict[str, Any]:
    if step.kind == "check":
        return check(place)
    if step.kind == "report":
        return report(place)
    module, name = {
        "export": ("profiles.gpu.latency", "export_model"),
        "latency": ("profiles.gpu.latency", "measure_latency"),
        "breakdown": ("profiles.gpu.latency", "add_breakdowns"),
        "tokens": ("profiles.gpu.tokens", "compare_tokens"),
    }[step.kind]
    result: dict[str, Any] = getattr(importlib.import_module(module), name)(step, place)
    return result


def main(arguments: list[str]) -> int:
    """Run the step and write {"detail"} or {"error"} for the parent."""
    name, result, out, work, device, shapes = arguments
    (step,) = [step for step in STEPS if step.name == name]
    try:
        found: dict[str, Any] = {"detail": _run(step, Place(Path(out), Path(work), device, shapes))}
    except Exception as error:  # whatever it is, the parent has to be told
        traceback.print_exc()
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    Path(result).write_text(json.dumps(found, ensure_ascii=False), "utf-8")
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
