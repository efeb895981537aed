"""Lengths, rates and shares of a run; Adafactor against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from exporter.cli import app
from exporter.errors import UserError
from exporter.uptrain import OPTIMIZERS, PRECISIONS, TRAINABLE, UptrainOptions
from exporter.uptrain.adafactor import Adafactor


def test_alpha_is_a_share_of_the_original_tokens(few) -> None:
    assert few(steps=None, alpha=0.05, original_tokens=1e6, batch=10, window=100).total_steps == 50
    assert few(steps=None, alpha=0.05, original_tokens=1e6 + 1, batch=10, window=100).total_steps == 51
    assert few(steps=None, alpha=1e-9, original_tokens=10.0).total_steps == 1
    assert few().total_steps == 6


def test_the_rate_is_transformers_cosine(few) -> None:
    """theirs warms up from 0, ours ends its warm-up where theirs does."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    options = few(steps=40, warmup=0.1, lr=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 4, 40, min_lr_rate=0.1)
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [options.rate(step) for step in range(40)]
    assert ours[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert ours[4:] == pytest.approx(rates[4:])
    assert few(lr=None).rate(0) == 1e-4
    assert few(lr=None, optimizer="adafactor").rate(0) == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "uptraining needs data: a text file, a .jsonl file, or hf:NAME for what the datasets package loads"),
        ({"steps": None}, "how long to train: give --steps, or --alpha with --original-tokens, and not both"),
        ({"alpha": 0.1, "original_tokens": 5.0}, "how long to train: give --steps, or --alpha with --original-tokens, and not"),
        ({"steps": None, "alpha": 0.1}, "--alpha and --original-tokens go together: the share of the original pre-training"),
        ({"steps": None, "alpha": -0.1, "original_tokens": 5.0}, "--alpha -0.1 is not a number above 0"),
        ({"lr": math.nan}, "--lr nan is not a number above 0"),
        ({"kl": -1.0}, "--kl -1.0 is not a number from 0"),
        ({"teacher": "x", "kl": 0.0, "hidden": 0.0}, "with --kl 0 and --hidden 0 the teacher teaches nothing; leave it out"),
        ({"window": 1}, "--window 1 is not a whole number from 2"),
        ({"held_out": 0}, "--held-out 0 is not a whole number from 1"),
        ({"warmup": 1.0}, "--warmup 1.0 is not a share of the steps"),
        ({"optimizer": "sgd"}, "optimizer 'sgd' is not one of adamw, adafactor"),
        ({"dtype": "fp16"}, "dtype 'fp16' is not one of fp32, bf16"),
    ],
)
def test_refusals(few, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        few(**changes)
    assert str(refusal.value).startswith(message)


def test_shares(few) -> None:
    assert few(batch=12).share(1) == (12, 12)
    assert few(batch=12, micro_batch=2).share(3) == (4, 2)
    assert few(batch=12, micro_batch=8).share(3) == (4, 4)
    with pytest.raises(UserError, match="a batch of 12 windows does not divide among 5 processes; choose a multiple"):
        few(batch=12).share(5)
    with pytest.raises(UserError, match="--micro-batch 3 does not divide the 4 windows of a batch that a process has"):
        few(batch=12, micro_batch=3).share(3)


def test_the_command_line_knows_the_same_words_and_defaults() -> None:
    options = {option.name: option for option in app.get_command(None, "uptrain").params}  # type: ignore[arg-type, union-attr]
    for name, choices in (("optimizer", OPTIMIZERS), ("train", TRAINABLE), ("dtype", PRECISIONS)):
        assert options[name].type.choices == choices  # type: ignore[attr-defined]
    defaults = UptrainOptions(("x",), steps=1)
    for name in ("field", "batch", "window", "optimizer", "warmup", "train", "kl", "hidden", "held_out", "save_every", "seed"):
        assert options[name].default == getattr(defaults, name)


def test_adafactor_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) * scale for shape, scale in (((7, 12), 1.0), ((5,), 0.1), ((3, 3), 1e-5))]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    optimizers = Adafactor(ours, lr=0.05), torch.optim.Adafactor(theirs, lr=0.05)
    for step in range(30):
        for group in (optimizers[0].param_groups[0], optimizers[1].param_groups[0]):
            group["lr"] = 0.5 / (1 + step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator) * (10.0 if step % 7 == 3 else 0.01)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        assert not torch.equal(mine, first)
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-5)
