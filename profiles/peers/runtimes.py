"""The runtimes that are compared, how their processes are started, and where their models lie."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.engines.base import SessionInfo
from exporter.files import new_folder
from profiles.bundles import subject_of
from profiles.peers import with_headpool
from profiles.peers.models import GGUF
from profiles.peers.process import ROOT, WorkerProcess
from profiles.peers.session import PeerSession
from profiles.results import Subject

WEIGHTS = ("fp32", "int4")


@dataclass(frozen=True)
class Runtime:
    """One line of the comparison. `name` stands where headpool's own graphs have their pattern."""

    name: str
    module: str  # of profiles.peers, run by a worker
    environment: str = ""  # a folder of the repository; empty: the environment that this runs in
    cache: str = ""
    source: str = "huggingface"  # what it is exported from
    options: dict[str, Any] = field(default_factory=dict)  # of its Runner

    @property
    def own(self) -> bool:
        """Whether it is headpool."""
        return self.module == HEADPOOL

    @property
    def python(self) -> Path:
        return ROOT / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def start(self, place: Place) -> WorkerProcess:
        """Raises EngineError where it cannot run here."""
        command = [str(self.python), "-m", "profiles.peers.worker", f"profiles.peers.{self.module}"]
        return WorkerProcess(self.name, command, place.log(self.module), place.threads)


HEADPOOL = "with_headpool"
RUNTIMES = (
    *(Runtime(f"headpool {pattern}", HEADPOOL, options={"pattern": pattern}) for pattern in with_headpool.PATTERNS),
    Runtime("onnxruntime-genai", "with_genai", ".venv-peers-genai", "static"),
    Runtime("OpenVINO", "with_openvino", ".venv-peers-openvino", "state"),
    Runtime("llama.cpp", "with_llama_cpp", ".venv-peers-llama.cpp", "static", GGUF),
    Runtime("llama.cpp -fa 1", "with_llama_cpp", ".venv-peers-llama.cpp", "static", GGUF, {"flash": True}),
    Runtime("optimum-onnx", "with_optimum", ".venv-peers-optimum", "concat"),
)


@dataclass(frozen=True)
class Place:
    """Where a comparison keeps what it makes, and the threads of all its processes."""

    folder: Path
    threads: int

    def log(self, name: str) -> Path:
        (self.folder / "logs").mkdir(exist_ok=True)
        return self.folder / "logs" / f"{name}.log"

    def checkpoint(self, groups: int) -> Path:
        return self.folder / "models" / f"g{groups}"

    def model(self, runtime: Runtime, weights: str, groups: int) -> Path:
        return self.checkpoint(groups) / f"{runtime.module.removeprefix('with_')}.{weights}" / "model"


def make_model(runtime: Runtime, weights: str, groups: int, place: Place) -> Path:
    """What `runtime` runs, exported by its own tools where it has not been yet. Raises EngineError."""
    model = place.model(runtime, weights, groups)
    if not model.exists():
        with new_folder(model.parent) as folder:
            checkpoint, out = place.checkpoint(groups) / runtime.source, folder / "model"
            if runtime.own:
                with_headpool.export(checkpoint, out, weights)  # here, where all it imports is already
                return model
            worker = runtime.start(place)
            try:
                worker.ask("export", checkpoint=str(checkpoint), out=str(out), weights=weights)
            finally:
                worker.close()
    return model


@dataclass(frozen=True)
class Opener:
    """measure.OpenSession of one runtime and model. `room` is for the tokens of a burst after the context."""

    runtime: Runtime
    weights: str
    groups: int
    place: Place
    room: int

    def __call__(self, *, batch: int, capacity: int, profile_to: Path | None = None) -> PeerSession:
        model = self.place.model(self.runtime, self.weights, self.groups)
        config = open_source(self.place.checkpoint(self.groups) / "huggingface").config
        worker = self.runtime.start(self.place)
        try:
            sizes = {"batch": batch, "capacity": capacity + self.room, "threads": self.place.threads}
            info = worker.ask("open", model=str(model), **sizes, **self.runtime.options)
        except BaseException:
            worker.close()
            raise
        provider = "CPUExecutionProvider" if self.runtime.own else "CPU"
        backend = "onnxruntime" if self.runtime.own else self.runtime.name
        return PeerSession(worker, config, batch, capacity, SessionInfo(backend, provider, info["versions"], info["options"]))

    @property
    def subject(self) -> Subject:
        """headpool's own, in the runtime's name: its weights' bytes are of int4 in blocks of 32, whatever the runtime stores
        beside them, so that all have one floor."""
        own = next(runtime for runtime in RUNTIMES if runtime.own)
        model = Bundle.open(self.place.model(own, self.weights, self.groups))
        pattern = self.runtime.options.get("pattern", model.variants[0].pattern)
        [variant] = [variant for variant in model.variants if variant.pattern == pattern]
        changes: dict[str, Any] = {"model": "decoder", "bundle": f"g{self.groups}.{self.weights}"}
        if not self.runtime.own:
            changes |= {"pattern": self.runtime.name, "cache": self.runtime.cache, "bundle_hash": self.runtime.name}
            changes |= {"variant": f"g{self.groups}.{self.runtime.name}"}
        return dataclasses.replace(subject_of(model, variant), **changes)
