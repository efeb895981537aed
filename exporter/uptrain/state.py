"""Checkpoints of a run in training: weights and optimizer, sharded as they are, whole or absent.

The rate and the windows of a step follow from its number and the seed, and nothing else draws random numbers, so weights,
optimizer and the number of steps are all there is to keep. A run may go on with another number of processes.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from exporter.errors import UserError
from exporter.uptrain.processes import Processes

PREFIX = "step-"


def latest(folder: Path) -> int:
    """The steps done at the last checkpoint in `folder`; 0 where there is none."""
    return max((int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*")), default=0)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, group: Processes) -> None:
    """Write the checkpoint of `step` done, then remove the one before. Raises UserError where it cannot be written."""
    whole, partial = folder / f"{PREFIX}{step:08}", folder / f".{PREFIX}{step:08}.partial"
    group.once(lambda: _fresh(partial))
    try:
        with _quiet():
            dcp.save(_state(model, optimizer), checkpoint_id=partial, no_dist=group.mesh is None)
    except (dcp.api.CheckpointException, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {_reason(error)}; step {latest(folder)} is the last kept") from error
    group.once(lambda: _settle(folder, whole, partial))


def load(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, group: Processes) -> None:
    """Put the checkpoint of `step` into `model` and `optimizer`. Raises UserError where it is damaged."""
    state = _state(model, optimizer)
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=folder / f"{PREFIX}{step:08}", no_dist=group.mesh is None)
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged file fails in as many ways as there are readers
        raise UserError(
            f"the checkpoint of step {step} in {folder} cannot be read: {_reason(error)}; remove {folder} to begin anew"
        ) from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()


def _settle(folder: Path, whole: Path, partial: Path) -> None:
    shutil.rmtree(whole, ignore_errors=True)
    os.rename(partial, whole)
    for other in folder.glob(f"{PREFIX}*"):
        if other != whole:
            shutil.rmtree(other, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The first of what the processes say, on one line."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def _quiet() -> warnings.catch_warnings:
    """Of the library's own machinery, nothing a user can do something about."""
    return warnings.catch_warnings(action="ignore")
