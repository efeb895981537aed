"""The uptrain stage: a checkpoint in, the same checkpoint trained a little more out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from exporter.checkpoint import Checkpoint, expected_shapes, hf_config_for, open_checkpoint, open_source, write_checkpoint
from exporter.errors import EngineError, UserError
from exporter.files import alone_in, check_output, refuse_existing
from exporter.models.decoder import canonical_to_module
from exporter.seq2seq_config import require_decoder
from exporter.uptrain import run_folder, state
from exporter.uptrain.metrics import BOARD, JSON, Metrics, read_metrics
from exporter.uptrain.options import UptrainOptions
from exporter.uptrain.processes import Processes, processes
from exporter.uptrain.tokens import Windows
from exporter.uptrain.trainer import Trainer
from exporter.weights import ComputedTensor

RECORD = "uptraining.json"
RESULT = "result"

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Uptrained:
    """What a run came to. Losses are cross-entropy in nats a token on the windows held out, before and after."""

    steps: int
    tokens: int
    passes: float  # over the data that there was
    before: float
    after: float
    seconds: float
    processes: int
    dtype: str  # of the matrix products
    parameters: int  # that were trained


def uptrain(
    path: Path, out: Path, options: UptrainOptions, progress: Progress = lambda what, done, total: None
) -> Uptrained | None:
    """Train the checkpoint `path` (or a config.json with random weights) and write it to the folder `out`.

    `out` is a Hugging Face checkpoint with the tensors' old dtypes, with `uptraining.json` (options and outcome),
    `metrics.jsonl` (a row a step) and `runs/` (TensorBoard) beside; it is whole or absent, and only the first process of
    several returns what it came to. Until then everything lies in `out`.run: the same call goes on from the last checkpoint
    there, bit for bit as if it had not stopped (on the same machine and number of processes). SIGINT and SIGTERM let the step
    end, keep a checkpoint, and raise KeyboardInterrupt. Raises UserError, also for a loss that is not finite and for a
    process that died; the last checkpoint stays.
    """
    folder = run_folder.run_folder(out)
    with processes(options.device) as group, contextlib.ExitStack() as stack:
        stack.enter_context(_clear(folder))
        quiet: Progress = progress if group.first else lambda what, done, total: None
        group.once(lambda: _check(path, out, options, group.count))
        source, teacher = _open(path, options)

        def begin() -> None:
            run_folder.prepare(folder, source, teacher, options, quiet)
            stack.enter_context(alone_in(folder))

        group.once(begin)
        windows = Windows.open(folder / run_folder.TOKENS, options.window, options.held_out, options.seed)
        trainer = Trainer(source, teacher, windows, options, group)
        _train(trainer, folder, quiet)
        gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)  # by all, kept by the first
        weights = get_model_state_dict(trainer.model, options=gathered)
        if not group.first:
            return None
        return _finish(folder, out, source, weights, trainer)


def _check(path: Path, out: Path, options: UptrainOptions, count: int) -> None:
    """All that can be known before anything is computed."""
    check_output(out, path)
    options.share(count)
    source, teacher = _open(path, options)
    config = source.config
    require_decoder(config, path, "uptrain")
    hf_config_for(config, source.hf_config, torch.float32)
    if options.window > config.max_positions:
        raise UserError(f"window {options.window} is longer than the model's context of {config.max_positions} tokens")
    if teacher is not None:
        require_decoder(teacher.config, options.teacher, "uptrain")
        for what in ("vocab_size", "num_layers", "hidden_size"):
            if getattr(teacher.config, what) != getattr(config, what):
                raise UserError(
                    f"teacher {options.teacher} has {what} {getattr(teacher.config, what)}, the model {getattr(config, what)}; "
                    "give the checkpoint that it was converted from"
                )


def _open(path: Path, options: UptrainOptions) -> tuple[Checkpoint, Checkpoint | None]:
    return open_source(path, options.seed), open_checkpoint(options.teacher) if options.teacher else None


def _train(trainer: Trainer, folder: Path, progress: Progress) -> None:
    """From the last checkpoint to the last step."""
    options, group = trainer.options, trainer.group
    start, total = group.once(lambda: state.latest(folder)), options.total_steps
    if start:
        state.load(folder, start, trainer.model, trainer.optimizer, group)
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(contextlib.closing(Metrics(folder, start))) if group.first else None
        interrupted = stack.enter_context(_interrupts(group))
        if not start:
            value = trainer.held_out()
            if not math.isfinite(value):
                group.once(lambda: _useless(value))
            if metrics:
                metrics.write({"step": 0, "tokens": 0, "held_out": value})
        for number in range(start, total):
            row, done = trainer.step(number), number + 1
            stop = group.any(interrupted())
            keep = stop or done % options.save_every == 0 or done == total
            if row and keep:
                row["held_out"] = trainer.held_out()
            if not row or not all(map(math.isfinite, row.values())):
                group.once(functools.partial(_diverged, folder, done, options))
            if metrics:
                metrics.write(row)
            if keep:
                state.save(folder, done, trainer.model, trainer.optimizer, group)
            progress("training", done, total)
            if stop and done < total:
                raise KeyboardInterrupt


def _useless(value: float) -> None:
    raise UserError(f"the model's loss on the windows held out is {value} before any training; there is nothing to go on from")


def _diverged(folder: Path, step: int, options: UptrainOptions) -> None:
    kept = state.latest(folder)
    there = f"go on from step {kept}, which {folder} keeps," if kept else f"begin again ({folder} has no checkpoint yet)"
    raise UserError(
        f"the loss or its gradient is not finite at step {step}; {there} by the same command with a smaller lr (now "
        f"{options.rate(step - 1):.2g}), or remove {folder} to begin anew"
    )


@contextlib.contextmanager
def _interrupts(group: Processes) -> Iterator[Callable[[], bool]]:
    """The first signal is remembered until the step is done; a second one ends a single process at once."""
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if seen and group.mesh is None:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _clear(folder: Path) -> Iterator[None]:
    """What torch says of a full GPU and of a lost process, in a line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("not enough GPU memory; take a smaller micro_batch, a shorter window, or checkpointing") from error
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower():
            kept = state.latest(folder)
            raise EngineError(
                f"a process of the run died or was lost; the same command goes on from step {kept}, the last kept in {folder}"
            ) from error
        raise


def _finish(folder: Path, out: Path, source: Checkpoint, weights: dict[str, Any], trainer: Trainer) -> Uptrained:
    """Write the result inside the run's folder, move it into place, and remove the rest."""
    rows = read_metrics(folder)
    windows, options = trainer.windows, trainer.options
    outcome = Uptrained(
        steps=options.total_steps,
        tokens=options.total_steps * options.batch * options.window,
        passes=options.total_steps * options.batch / windows.count,
        before=rows[0]["held_out"],
        after=rows[-1]["held_out"],
        seconds=sum(row.get("seconds", 0.0) for row in rows),
        processes=trainer.group.count,
        dtype=trainer.dtype,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
    )
    tensors = {
        name: _tensor(name, source.weights[name].dtype, weights[canonical_to_module(name)])
        for name in expected_shapes(source.config)
    }
    result = folder / RESULT
    shutil.rmtree(result, ignore_errors=True)
    write_checkpoint(dataclasses.replace(source, weights=tensors), result)
    record = {"options": dataclasses.asdict(options), "outcome": dataclasses.asdict(outcome)}
    (result / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    shutil.copy(folder / JSON, result)
    if (folder / BOARD).is_dir():
        shutil.copytree(folder / BOARD, result / BOARD)
    refuse_existing(out)
    os.rename(result, out)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _tensor(name: str, dtype: torch.dtype, value: torch.Tensor) -> ComputedTensor:
    return ComputedTensor(name, dtype, tuple(value.shape), lambda: value)
