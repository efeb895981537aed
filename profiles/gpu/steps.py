"""The steps of the suite, the most valuable first, each with the most seconds it may take. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

PATTERNS = {
    "torch": ("sdpa", "sdpa-compiled"),
    "onnxruntime": ("gqa", "attention", "grouped"),
    "tensorrt-rtx": ("attention", "grouped"),
    "tensorrt": ("attention", "grouped"),
    "onnxruntime-tensorrt-rtx": ("attention",),
    "onnxruntime-tensorrt": ("attention",),
}
BACKENDS = tuple(PATTERNS)


@dataclass(frozen=True)
class Step:
    """One process. `model` is of models.py; `backend` and `pattern` "" where the kind has none."""

    kind: str  # check, export, tokens, latency, breakdown, report
    seconds: int
    model: str = ""
    backend: str = ""
    pattern: str = ""

    @property
    def name(self) -> str:
        return ".".join(part for part in (self.kind, self.model, self.backend, self.pattern) if part)


STEPS = (
    Step("check", 120),
    Step("latency", 180, "layers", "torch", "sdpa"),
    Step("export", 120, "heads"),
    Step("tokens", 90, "heads", "torch"),
    Step("tokens", 120, "heads", "onnxruntime"),
    Step("export", 240, "layers"),
    Step("latency", 240, "layers", "onnxruntime", "gqa"),
    Step("tokens", 180, "heads", "tensorrt-rtx"),
    Step("latency", 300, "layers", "tensorrt-rtx", "attention"),
    Step("tokens", 240, "heads", "tensorrt"),
    Step("latency", 420, "layers", "tensorrt", "attention"),
    Step("export", 120, "smollm2"),
    Step("latency", 90, "smollm2", "torch", "sdpa"),
    Step("tokens", 120, "smollm2", "onnxruntime"),
    Step("latency", 120, "smollm2", "onnxruntime", "gqa"),
    Step("tokens", 120, "smollm2", "tensorrt-rtx"),
    Step("latency", 120, "smollm2", "tensorrt-rtx", "attention"),
    Step("tokens", 180, "smollm2", "tensorrt"),
    Step("latency", 180, "smollm2", "tensorrt", "attention"),
    Step("latency", 240, "layers", "onnxruntime", "attention"),
    Step("latency", 240, "layers", "onnxruntime", "grouped"),
    Step("breakdown", 120, "layers", "tensorrt-rtx", "attention"),
    Step("breakdown", 120, "layers", "tensorrt", "attention"),
    Step("breakdown", 120, "layers", "onnxruntime", "gqa"),
    Step("tokens", 180, "heads", "onnxruntime-tensorrt-rtx"),
    Step("latency", 300, "layers", "onnxruntime-tensorrt-rtx", "attention"),
    Step("tokens", 180, "heads", "onnxruntime-tensorrt"),
    Step("latency", 300, "layers", "onnxruntime-tensorrt", "attention"),
    Step("latency", 300, "layers", "torch", "sdpa-compiled"),
    Step("latency", 240, "layers", "tensorrt-rtx", "grouped"),
    Step("latency", 240, "layers", "tensorrt", "grouped"),
    Step("report", 60),
)
ALWAYS = ("check", "report")  # the first and the last, whatever is chosen


def chosen(words: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps whose name has each part of one of `words` ("latency.layers", "onnxruntime"); all without words.

    What a step needs comes along: the export of its model, the latency that it breaks down. Raises ValueError for a word that
    fits none.
    """
    if not words:
        return STEPS
    names = set[str](ALWAYS)
    for word in words:
        fitting = [step for step in STEPS if set(word.split(".")) <= set(step.name.split("."))]
        if not fitting:
            raise ValueError(f"step {word!r} is not one of {', '.join(step.name for step in STEPS)}, or a part of one")
        names |= {step.name for step in fitting} | {f"export.{step.model}" for step in fitting if step.model}
        names |= {step.name.replace("breakdown", "latency") for step in fitting}
    return tuple(step for step in STEPS if step.name in names)
