"""The processes of one run: one, or as many as torchrun started, each with a device of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from exporter.errors import EngineError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the others wait while one tokenizes; a process that dies is noticed at once all the same


@dataclass(frozen=True)
class Processes:
    """This process among `count`. Every method is called by all of them, in the same order."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None  # None where there is only one

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of every process's `values`, on each."""
        if self.mesh is None:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag if self.mesh is None else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process. A UserError is raised there, to be told once; the others just end."""
        if self.mesh is None:
            return work()
        outcome: list[Any] = [None, True]
        try:
            if self.first:
                outcome = [work(), False]
        finally:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1]:
            raise SystemExit(2)
        return outcome[0]


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun's environment describes, connected: by NCCL on GPUs, by Gloo on CPUs.

    `device` is cpu or cuda; None is cuda where there is one. Raises EngineError.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise EngineError(f"device {device!r} is not one of cpu, cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"torch {torch.__version__} finds no CUDA device; choose device cpu")
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise EngineError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start fewer")
    here = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(here)
        _repeatable()
    if count == 1:
        yield Processes(0, 1, here, None)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count, here, init_device_mesh(kind, (count,)))
    finally:
        dist.destroy_process_group()


def _repeatable() -> None:
    """On a GPU, sums in the same order every time, so that a run that was interrupted goes on as it would have."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def computes_in_bf16(device: torch.device) -> bool:
    """Whether its matrix products are in bf16 by hardware, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
