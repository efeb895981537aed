"""The NVIDIA GPU of this machine, by way of torch: it is a dependency already, and holds device memory and CUDA graphs."""

from __future__ import annotations

from exporter.errors import EngineError


def missing() -> str | None:
    """Why there is no GPU that torch can use; None where there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU or driver"
    return f"{why} (torch {torch.__version__})"


def check_device() -> None:
    """Raises EngineError in one line where there is no GPU."""
    if (why := missing()) is not None:
        raise EngineError(f"TensorRT engines run on an NVIDIA GPU: {why}")


def compute_capability() -> str:
    """ "sm89" for the current device. Raises EngineError where there is none."""
    import torch

    check_device()
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
