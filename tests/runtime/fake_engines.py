"""Engines for runtime/tests/fake_tensorrt.cpp: engine.json as `headpool build` writes it, and "plans" that name an ONNX graph.

python tests/runtime/fake_engines.py BUNDLE gives its grouped and attention variants engines of batch 1, 2 and 3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle, Variant
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.build import _bindings
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.record import EngineRecord, Profile, Recipe, Verified

VERSION, CHIP = "1.2.3.4", "sm89"  # what the fake says it is
NETWORK = Verified(0, 0, 0, 0, 0, "1:1", ())  # of no interest to a session


def add(
    bundle: Bundle, variant: Variant, backend: str, *, batch: int = 1, capacity: int = 120, prefill: int = 64, **recipe: Any
) -> Path:
    """Writes an engine beside those there are; returns its folder. `recipe` changes its recipe."""
    made = Recipe(
        **{
            "graph_sha256": "",
            "weights_sha256": {},
            "backend": backend,
            "module": backend.replace("-", "_"),
            "version": VERSION,
            "targets": (CHIP,),
            "batch": batch,
            "capacity": capacity,
            "prefill": prefill,
            "optimisation": None,
            "workspace_bytes": None,
            "strip": False,
            "compatible": (),
            "quantize": None,
            **recipe,
        }
    )
    folder = bundle.path / record.FOLDER / record.folder_name(backend, made.targets)
    folder.mkdir(parents=True, exist_ok=True)
    there = record.read(folder)
    name = f"model.{variant.name}.{len(there)}"
    profiles = (Profile("prefill", 1, prefill, prefill), Profile("decode", 1, 1, 1))
    bindings = _bindings(parts_of(variant)[0], made)
    engine = EngineRecord(variant.name, f"{name}.engine", f"{name}.log", 0, "", 0.0, made, profiles, bindings, NETWORK)
    plan = f"{batch} {capacity} {prefill} {bundle.graph_path(variant).resolve()}\n"
    record.write(folder, (*there, set_plan(folder, engine, plan)))
    return folder


def set_plan(folder: Path, engine: EngineRecord, plan: str) -> EngineRecord:
    """Writes the plan; returns the engine's record with its size and hash."""
    (folder / engine.file).write_text(plan)
    data = plan.encode()
    return dataclasses.replace(engine, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


if __name__ == "__main__":
    opened = Bundle.open(Path(sys.argv[1]))
    for one in opened.variants:
        if isinstance(one, Variant) and one.pattern in ("grouped", "attention"):
            for count in (1, 2, 3):
                add(opened, one, "tensorrt", batch=count)
