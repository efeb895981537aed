"""The one place that imports TensorRT: which module a backend is, what it can build for, and its log.

`tensorrt` builds for the GPU it runs on. `tensorrt_rtx` also builds ahead of time, on a machine with no GPU, for chips named.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any

from exporter.errors import EngineError, one_of

MODULES = {
    "tensorrt": ("tensorrt", "pip install 'headpool[tensorrt]'"),
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'headpool[tensorrt-rtx]'"),
}
HERE = "here"  # the target that is the GPU of this machine


@dataclass(frozen=True)
class Api:
    """An imported TensorRT. `trt` is the module; both kinds are used through the same names."""

    backend: str
    trt: Any
    version: str

    @property
    def rtx(self) -> bool:
        return self.backend == "tensorrt-rtx"

    def chips(self) -> tuple[str, ...]:
        """The compute capabilities that can be built for without the chip ("sm75", …); none where it wants its own GPU."""
        kinds = getattr(self.trt, "ComputeCapability", None)
        names = [] if kinds is None else [name for name in kinds.__members__ if name.startswith("SM")]
        return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))

    def check_targets(self, targets: tuple[str, ...]) -> None:
        """Refuse a target that this module cannot build for. Raises EngineError."""
        for target in targets:
            if target != HERE and target not in self.chips():
                choices = (*self.chips(), HERE)
                raise EngineError(f"{self.trt.__name__} {self.version}: {one_of('target', target, choices)}")
        if len(set(targets)) != len(targets) or (HERE in targets and len(targets) > 1):
            raise EngineError(f"targets {', '.join(targets)}: name each once, and {HERE} alone")


def load(backend: str) -> Api:
    """Import the module of `backend`. Raises EngineError with the command that installs it."""
    if backend not in MODULES:
        raise EngineError(one_of("backend", backend, MODULES))
    module, install = MODULES[backend]
    try:
        trt = importlib.import_module(module)
        if not hasattr(trt, "__version__"):  # a folder of that name
            raise ModuleNotFoundError(name=module)
    except ImportError as error:
        missing = error.name == module
        why = "which is not installed" if missing else f"which does not load here ({' '.join(str(error).split())})"
        raise EngineError(f"backend {backend} needs {module}, {why}: {install}") from None
    return Api(backend, trt, trt.__version__)


@dataclass
class Messages:
    """What a builder, parser or runtime said, in order: (severity, text)."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def text(self) -> str:
        return "".join(f"[{severity.lower()}] {message}\n" for severity, message in self.lines)

    def reason(self) -> str:
        """The first error in one line; the missing driver, which every later error repeats, only where it is all there is."""
        errors = [message for severity, message in self.lines if "ERROR" in severity]
        others = [message for message in errors if "cudaError" not in message]
        return " ".join(re.sub(r"\s+In \w+ at \S+", "", (others or errors or ["it gave no reason"])[0]).split())[:400]


def logger(trt: Any, messages: Messages) -> Any:
    """An ILogger that keeps what is said, at level info and above."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                messages.lines.append((severity.name, message))

    return Log()
