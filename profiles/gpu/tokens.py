"""Does every engine give torch's tokens? Logits of a prompt and of forced decode steps against float32 torch, for every G.

Greedy tokens of a random model flip where two logits are closer than fp16 can tell, so the tokens of float32 torch are fed to
both sides; what decides is the largest difference of logits, in standard deviations of a step's logits.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bundle import Bundle
from exporter.convert import Converter
from exporter.engines import open_session
from exporter.engines.base import Session
from exporter.engines.ort_session import OrtSession
from exporter.engines.torch_eager import TorchSession
from exporter.errors import EngineError
from exporter.models.decoder import Decoder
from exporter.weights import TORCH_DTYPES
from profiles.gpu.latency import backend_name, build_engines
from profiles.gpu.models import model as model_of
from profiles.gpu.place import Place
from profiles.gpu.steps import PATTERNS, Step
from profiles.gpu.yardstick import YardstickSession

PROMPT, STEPS = 40, 24
CAPACITY = 128
# Standard deviations of a step's logits. The tests make mistakes of heads, rows and positions, which come to 0.25 and more;
# fp32 rounds by some 1e-6, and fp16 8,000 times as coarsely.
LIMITS = {"fp32": 1e-3, "fp16": 0.1}


def compare_tokens(step: Step, place: Place) -> dict[str, Any]:
    """A row for each number of KV heads and pattern. Raises EngineError, after all were tried, where one is off or fails."""
    source = model_of(step.model, place.shapes)
    checkpoint = source.open(place.work)
    convert = Converter(checkpoint)
    rows = []
    for groups in source.groups:
        prompt = np.random.default_rng(groups).integers(0, checkpoint.config.vocab_size, PROMPT)
        forced, wanted = _reference(convert, groups, place.device, prompt)
        for pattern in PATTERNS[step.backend]:
            if pattern == "sdpa-compiled":
                continue  # the same kernels or others of the same sums; latency only
            row: dict[str, Any] = {"groups": groups, "pattern": pattern}
            try:
                row |= _compare(_open(step, place, convert, groups, pattern), prompt, forced, wanted)
                row["ok"] = bool(row["worst"] <= LIMITS[place.dtype])
            except Exception as error:  # the next variant may do better
                row |= {"ok": False, "error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if step.backend.startswith("onnxruntime"):
        rows.append({"off the device": _placement(step, place)})
    bad = [f"g{row['groups']}.{row['pattern']}" for row in rows if not row.get("ok", True)]
    if bad:
        raise EngineError(f"{', '.join(bad)} of {len(rows)} variants are off or failed; rows: {json.dumps(rows)}")
    return {"rows": rows}


def _reference(convert: Converter, groups: int, device: str, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [STEPS] of float32 torch and its logits [STEPS + 1, V]."""
    config, weights = convert(groups)
    model = Decoder.from_weights(config, weights).to(device)
    with TorchSession(model, 1, CAPACITY) as session:
        logits = [session.prefill([prompt])[0].copy()]
        for _ in range(STEPS):
            logits.append(session.decode(logits[-1].argmax(keepdims=True))[0].copy())
    steps = np.stack(logits)
    return steps[:-1].argmax(-1), steps


def _compare(session: Session, prompt: np.ndarray, forced: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Shared greedy tokens, and the worst logit's distance; every length twice, as a session may change its ways by then."""
    with session:
        found = [session.prefill([prompt])[0].copy()]
        for token in forced:
            length = int(session.lengths[0])
            session.decode(token[None])
            session.rewind(length)
            found.append(session.decode(token[None])[0].copy())
    steps = np.stack(found)
    worst = np.abs(steps - wanted).max(-1) / wanted.std(-1)
    same = int((steps.argmax(-1) == wanted.argmax(-1)).sum())
    return {"same": same, "of": len(wanted), "worst": float(worst.max()) if np.isfinite(worst).all() else float("inf")}


def _open(step: Step, place: Place, convert: Converter, groups: int, pattern: str) -> Session:
    if step.backend == "torch":
        config, weights = convert(groups)
        model = Decoder.from_weights(config, weights, TORCH_DTYPES[place.dtype]).to(place.device)
        return YardstickSession(model, 1, CAPACITY)
    bundle = Bundle.open(place.bundle(step.model))
    variant = bundle.variant(f"g{groups}.{pattern}")
    if step.backend.startswith("tensorrt"):
        build_engines(bundle, [variant], step.backend, CAPACITY)
    return open_session(bundle, variant, backend=backend_name(step.backend, place.device), capacity=CAPACITY)


def _placement(step: Step, place: Place) -> dict[str, dict[str, int]]:
    """Operators that ONNX Runtime runs elsewhere than on the device in one step, by pattern, from its own profile."""
    bundle, backend = Bundle.open(place.bundle(step.model)), backend_name(step.backend, place.device)
    found = {}
    for pattern in PATTERNS[step.backend]:
        prefix = place.work / f"placement-{step.model}-{pattern}"
        variant = next(v for v in bundle.variants if v.pattern == pattern)
        session = open_session(bundle, variant, backend=backend, capacity=CAPACITY, profile_to=prefix)
        session.prefill([np.arange(4)])
        session.close()  # which writes the profile
        assert isinstance(session, OrtSession)
        assert session.profile is not None
        found[pattern] = _elsewhere(session.profile, session.info.provider)
    return found


def _elsewhere(profile: Path, home: str) -> dict[str, int]:
    places = [event["args"] for event in json.loads(profile.read_text("utf-8")) if event.get("cat") == "Node"]
    return dict(Counter(p["op_name"] for p in places if p.get("provider", home) != home))
