"""Whole runs in one process: what comes out, and what is left to go on from when they stop."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporter.cli import _run
from exporter.convert import convert_checkpoint
from exporter.errors import UserError
from exporter.uptrain import state, uptrain
from exporter.uptrain.metrics import read_metrics
from exporter.uptrain.trainer import Trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def figures(folder: Path, *names: str) -> list[tuple[float, ...]]:
    return [tuple(row.get(name) for name in names) for row in read_metrics(folder)]  # type: ignore[misc]


def interrupt(at: int, monkeypatch, number: int = signal.SIGINT) -> None:
    """The signal comes in the middle of step `at` (from 0), once."""
    step = Trainer.step

    def interrupted(self: Trainer, number_of_step: int) -> dict[str, float]:
        if number_of_step == at:
            os.kill(os.getpid(), number)
            monkeypatch.setattr(Trainer, "step", step)
        return step(self, number_of_step)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_what_comes_out(saved, text, few, tmp_path) -> None:
    """transformers loads it, and gives the loss on the held-out windows that the run says."""
    from transformers import AutoModelForCausalLM

    convert_checkpoint(saved, tmp_path / "mqa", 1)
    done = uptrain(tmp_path / "mqa", tmp_path / "out", few(steps=25, teacher=str(saved)))
    assert done is not None
    assert done.after < done.before - 1
    assert (done.steps, done.tokens, done.processes, done.dtype) == (25, 25 * 4 * 24, 1, "fp32")
    assert [path.name for path in tmp_path.iterdir() if path.name != "mqa"] == ["out"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.num_key_value_heads == 1
    assert done.parameters == theirs.num_parameters()
    ids = torch.tensor(_tokens(saved, text)[: 3 * 24 + 1])
    windows = torch.stack([ids[start : start + 25] for start in (0, 24, 48)])
    for folder, loss in ((tmp_path / "mqa", done.before), (tmp_path / "out", done.after)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(windows, labels=windows).loss.item() == pytest.approx(loss, abs=1e-5)
    rows = read_metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(26))
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + row["kl"] + row["hidden"], rel=1e-5)
    assert rows[1]["kl"] > 0.1
    record = json.loads((tmp_path / "out" / "uptraining.json").read_text())
    assert record["options"]["teacher"] == str(saved)
    assert record["outcome"]["after"] == done.after


def _tokens(folder: Path, text: Path) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return tokenizer(text.read_text("utf-8"), add_special_tokens=False).input_ids


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adafactor", "train": "attention"}], ids=["adamw", "adafactor"])
def test_a_run_goes_on_bit_for_bit(changes, saved, few, run, tmp_path, monkeypatch) -> None:
    whole = run("whole", save_every=2, **changes)
    interrupt(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        uptrain(saved, tmp_path / "out", few(save_every=4, **changes))
    assert not (tmp_path / "out").exists()
    assert state.latest(tmp_path / "out.run") == 3
    with open(tmp_path / "out.run" / "metrics.jsonl", "a") as file:  # as if a later step had been begun
        file.write('{"step": 4, "loss": 99}\n{"step": 5, "lo')  # which a full disk cut short
    out = run("out", save_every=2, **changes)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(out).items())
    assert figures(out, "step", "loss", "lr", "gradient_norm") == figures(whole, "step", "loss", "lr", "gradient_norm")


def test_micro_batches_and_checkpointing_change_nothing_but_memory(run) -> None:
    first = run("a", teacher=None)
    for name, changes in (("b", {"micro_batch": 1}), ("c", {"checkpointing": True})):
        other = run(name, **changes)
        for mine, theirs in zip(figures(first, "loss"), figures(other, "loss"), strict=True):
            assert mine[0] == (pytest.approx(theirs[0], rel=1e-5) if theirs[0] else theirs[0])


def test_bf16_is_near_fp32(run) -> None:
    losses = [figures(run(dtype, dtype=dtype), "loss")[1:] for dtype in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    for wide, narrow in zip(*losses, strict=True):
        assert narrow[0] == pytest.approx(wide[0], rel=0.02)  # bf16 has 8 bits


def test_attention_only_changes_attention_only(saved, run) -> None:
    before, after = weights(saved), weights(run(train="attention"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name}


def test_a_loss_that_is_not_finite_stops_the_run(saved, few, run, tmp_path, monkeypatch) -> None:
    """The gradient of step 5 is infinite once; the last checkpoint is of step 4, and a smaller rate goes on from it."""
    backward = Trainer._backward
    calls: list[int] = []

    def poisoned(self: Trainer, ids: torch.Tensor, weight: float) -> torch.Tensor:
        figure = backward(self, ids, weight)
        calls.append(1)
        if len(calls) == 5:
            self.parameters[0].grad[0] = float("inf")  # type: ignore[index]
        return figure

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    with pytest.raises(UserError) as refusal:
        uptrain(saved, tmp_path / "out", few(save_every=2))
    folder = tmp_path / "out.run"
    assert str(refusal.value) == (
        f"the loss or its gradient is not finite at step 5; go on from step 4, which {folder} keeps, by the same "
        f"command with a smaller lr (now 0.0012), or remove {folder} to begin anew"
    )
    out = run("out", save_every=2, lr=1e-4)
    assert [row["lr"] > 1e-4 for row in read_metrics(out)[1:]] == [True] * 4 + [False] * 2


def test_a_run_that_has_no_checkpoint_yet_begins_again(saved, few, run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "step", lambda self, number: {"step": number + 1, "loss": float("nan")})
    with pytest.raises(UserError, match=r"not finite at step 1; begin again \(\S*out.run has no checkpoint yet\) by the same"):
        uptrain(saved, tmp_path / "out", few())
    monkeypatch.undo()
    rows = read_metrics(run("out"))
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_another_run_is_not_gone_on_with(saved, few, copy, tmp_path, monkeypatch) -> None:
    interrupt(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        uptrain(saved, tmp_path / "out", few())
    kept = sorted((tmp_path / "out.run").rglob("*"))
    anew = f"give what it was begun with to go on, or remove {tmp_path / 'out.run'} to begin anew"
    with pytest.raises(UserError) as refusal:
        uptrain(saved, tmp_path / "out", few(batch=8))
    assert str(refusal.value) == f"{tmp_path / 'out.run'} holds a run with --batch 4, not 8; {anew}"
    with pytest.raises(UserError, match="holds a run with --teacher None, not"):
        uptrain(saved, tmp_path / "out", few(teacher=str(copy)))
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    [header] = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + header])["model.layers.1.self_attn.k_proj.weight"]
    data[8 + header + entry["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="holds a run of another model; give what it was begun with"):
        uptrain(copy, tmp_path / "out", few())
    assert sorted((tmp_path / "out.run").rglob("*")) == kept
    tokens = (tmp_path / "out.run" / "tokens.bin").read_bytes()
    for broken in (tokens[:-4], None):
        (tmp_path / "out.run" / "tokens.bin").unlink()
        if broken:
            (tmp_path / "out.run" / "tokens.bin").write_bytes(broken)
        with pytest.raises(UserError, match=rf"damaged, it does not hold the run's {len(tokens) // 4} tokens; remove"):
            uptrain(saved, tmp_path / "out", few())
        (tmp_path / "out.run" / "tokens.bin").write_bytes(tokens)
    shard = max((tmp_path / "out.run" / "step-00000001").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"checkpoint of step 1 in \S*/out.run cannot be read: .*; remove \S*/out.run to begin"):
        uptrain(saved, tmp_path / "out", few())


def test_what_fails_leaves_nothing_new(saved, few, tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    refusals = {
        "at least 2017 are needed: 83 held-out windows and one": few(held_out=83, data=(str(tmp_path / "short.txt"),)),
        "data 'nowhere' is not a file": few(data=("nowhere",)),
        "data .*/empty.txt is empty; give some text": few(data=(str(tmp_path / "empty.txt"),)),
        "the data has 1 token, at least": few(data=(str(tmp_path / "blank.jsonl"),)),
        "window 4096 is longer than the model's context of 128 tokens": few(window=4096),
        "has num_layers 3, the model 2; give the checkpoint that it was converted from": few(teacher=str(tmp_path / "other")),
        "--micro-batch 3 does not divide the 4 windows of a batch that a process has": few(micro_batch=3),
    }
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}')  # a document without text: the token behind it alone
    config = AutoConfig.from_pretrained(saved)
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    for message, options in refusals.items():
        with pytest.raises(UserError, match=message):
            uptrain(saved, tmp_path / "out", options)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; choose another name or remove it"):
        uptrain(saved, tmp_path / "out", few())


def test_one_call_at_a_time(saved, few, tmp_path, monkeypatch) -> None:
    step, seen = Trainer.step, []

    def twice(self: Trainer, number: int) -> dict[str, float]:
        if not seen:
            seen.append(number)
            with pytest.raises(UserError, match="is in use: another call is at work there"):
                uptrain(saved, tmp_path / "out", few())
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", twice)
    uptrain(saved, tmp_path / "out", few())
    assert seen


def test_the_command_line(saved, text, tmp_path, monkeypatch, capfd) -> None:
    def headpool(*arguments: object) -> tuple[int, str, str]:
        code = _run([str(word) for word in arguments])
        return code, *capfd.readouterr()

    command = ["uptrain", saved, tmp_path / "out", "--data", text, "--window", "24", "--batch", "4", "--alpha", "0.5",
               "--original-tokens", "960", "--seed", "3"]  # fmt: skip
    interrupt(1, monkeypatch, signal.SIGTERM)
    code, out, err = headpool(*command)
    assert (code, out, err) == (130, "", f"headpool: interrupted; the same command goes on from {tmp_path / 'out.run'}\n")
    code, out, err = headpool(*command, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["steps"] == 5
    code, out, err = headpool(*command)
    assert (code, out) == (2, "")
    assert err == f"headpool: {tmp_path / 'out'} exists; choose another name or remove it\n"


def test_from_scratch(saved, text, tmp_path) -> None:
    """A config.json gets random weights."""
    folder = tmp_path / "config"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((saved / name).read_bytes())
    arguments = ["--data", str(text), "--steps", "3", "--window", "16", "--batch", "2"]
    assert _run(["uptrain", str(folder / "config.json"), str(tmp_path / "out"), *arguments]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_tensorboard(run, monkeypatch) -> None:
    """An event for each figure; and no events where tensorboardX is not installed."""
    from tensorboardX.proto.event_pb2 import Event

    folder = run("with")
    [file] = (folder / "runs").iterdir()
    data, found, place = file.read_bytes(), [], 0
    while place < len(data):  # length, its checksum, the event, its checksum
        [length] = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        place += 16 + length
    rows = read_metrics(folder)
    expected = {(row["step"], name): value for row in rows for name, value in row.items() if name != "step"}
    assert {(step, tag): value for step, tag, value in found} == {key: pytest.approx(v) for key, v in expected.items()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not (run("without") / "runs").exists()
