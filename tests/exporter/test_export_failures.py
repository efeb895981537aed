"""Exports that fail: said before the work where it can be, and nothing left behind."""

from __future__ import annotations

import dataclasses
import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exporter.export as stage
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import UserError
from exporter.export import ExportOptions, export
from exporter.weights import ComputedTensor


@pytest.mark.parametrize("storage", ["copy", "link"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, storage: Any, saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(state, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out", ExportOptions(storage=storage))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_values_beyond_half_precision(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.norm.weight"
    weights = {**checkpoint.weights, name: ComputedTensor(name, torch.float32, (48,), lambda: torch.full((48,), 1e5))}
    with pytest.raises(UserError, match=r"tensor 'model.norm.weight' has values beyond the range of torch.float16"):
        export(dataclasses.replace(checkpoint, weights=weights), tmp_path / "out", ExportOptions(dtype="fp16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "where", ["write_safetensors", "canonical_graph", "lower", "check_model", "genai_config", "_write_json"]
)
@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_nothing_is_left_of_a_failure(
    failure, where: str, snapshot, checkpoint: Checkpoint, saved: Path, tmp_path: Path, monkeypatch
) -> None:
    before = snapshot(saved)

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(
        "exporter.layout.write_safetensors" if where == "write_safetensors" else f"exporter.export.{where}", fail
    )
    with pytest.raises((KeyboardInterrupt, UserError)) as error:
        export(checkpoint, tmp_path / "out", ExportOptions(groups=(2, 1)))
    if isinstance(failure, OSError):
        assert str(error.value) == f"{tmp_path}/out cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())
    assert snapshot(saved) == before


def test_an_interrupt_does_not_wait_for_the_hash(checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    """Hashing 16 GB takes its time; Ctrl-C ends at once."""
    release = threading.Event()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "scan", lambda files: release.wait(30))
    monkeypatch.setattr(stage, "_write_graphs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", ExportOptions())
    assert not release.is_set()
    release.set()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("paged",)}, "pattern 'paged' is not one of repeat, grouped, attention, gqa, fused"),
        ({"patterns": ()}, "patterns : name each once, and at least one"),
        ({"patterns": ("gqa", "gqa")}, "patterns gqa, gqa: name each once, and at least one"),
        ({"groups": (3, 3)}, "group counts 3, 3: name each once, and at least one"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of fp32, fp16, bf16"),
        ({"cache": "ring"}, "cache 'ring' is not one of concat, static"),
        ({"logits": "some"}, "logits 'some' is not one of last, all"),
        ({"method": "sum"}, "method 'sum' is not one of mean, first, random, mean-renorm, procrustes, optimal"),
        ({"storage": "move"}, "weights 'move' is not one of copy, link"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ExportOptions(**options)
    assert str(error.value) == message


def test_refusals_come_before_the_work(checkpoint: Checkpoint, saved: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "scan", lambda files: pytest.fail("the work has begun"))
    for out, message in (
        (saved, f"{saved} exists; choose another name or remove it"),
        (tmp_path / "no" / "out", f"{tmp_path}/no/out cannot be written: {tmp_path}/no is not a folder"),
        (saved / "config.json" / "out", f"{saved}/config.json is not a folder; make it first, or choose another place"),
    ):
        with pytest.raises(UserError) as error:
            export(checkpoint, out, ExportOptions())
        assert message in str(error.value)
    with pytest.raises(UserError, match="4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"):
        export(checkpoint, tmp_path / "out", ExportOptions(groups=(2, 4)))
    assert not list(tmp_path.iterdir())
