"""How an uptraining run goes: its length, its batches, its rate, and what it is trained towards."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from exporter.errors import UserError, one_of, option

Optimizer = Literal["adamw", "adafactor"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Trainable = Literal["all", "attention"]
TRAINABLE: tuple[Trainable, ...] = get_args(Trainable)
PRECISIONS = ("fp32", "bf16")
RATES = {"adamw": 1e-4, "adafactor": 1e-3}  # Adafactor's is a share of each matrix's own size
FINAL_RATE = 0.1  # of the peak, at the cosine's end
# What may differ from call to call of one run: how steps are computed, not what they are; and the rate, if one diverged.
CHANGEABLE = ("lr", "micro_batch", "checkpointing", "dtype", "device", "save_every")


@dataclass(frozen=True)
class UptrainOptions:
    """Everything about a run but its model. Raises UserError for what cannot be.

    One of `steps`, or `alpha` with `original_tokens`, says how long: α is the paper's share of the original pre-training.
    A step reads `batch` windows of `window` tokens, over all processes; `micro_batch` of them at once in each. The loss is
    cross-entropy; with the checkpoint `teacher` plus `kl` · KL(teacher ‖ model) plus `hidden` · the squared distance of the
    hidden states after each layer as a share of the teacher's own.
    """

    data: tuple[str, ...]
    field: str = "text"  # of JSONL lines and rows that holds the text
    steps: int | None = None
    alpha: float | None = None
    original_tokens: float | None = None
    batch: int = 16
    micro_batch: int | None = None  # None: all that a process has of a batch
    window: int = 512
    optimizer: Optimizer = "adamw"
    lr: float | None = None  # at the peak; None: that of RATES
    warmup: float = 0.02  # share of the steps
    train: Trainable = "all"
    dtype: str | None = None  # of PRECISIONS; None: bf16 where the device computes in it
    checkpointing: bool = False
    teacher: str | None = None
    kl: float = 1.0
    hidden: float = 1.0
    held_out: int = 8  # windows at the data's beginning that are never trained on
    save_every: int = 100  # steps
    seed: int = 0
    device: str | None = None  # None: cuda where there is one

    def __post_init__(self) -> None:
        for what, value, choices in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("train", self.train, TRAINABLE),
            ("dtype", self.dtype or PRECISIONS[0], PRECISIONS),
        ):
            if value not in choices:
                raise UserError(one_of(what, value, choices))
        if not self.data:
            raise UserError("uptraining needs data: a text file, a .jsonl file, or hf:NAME for what the datasets package loads")
        least = {"steps": 1, "batch": 1, "micro_batch": 1, "window": 2, "held_out": 1, "save_every": 1, "seed": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise UserError(f"{option(name)} {value} is not a whole number from {bound}")
        for name in ("alpha", "original_tokens", "lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"{option(name)} {value} is not a number above 0")
        for name in ("kl", "hidden"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{option(name)} {value} is not a number from 0")
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup {self.warmup} is not a share of the steps, from 0 to below 1")
        if (self.alpha is None) != (self.original_tokens is None):
            raise UserError("--alpha and --original-tokens go together: the share of the original pre-training, and its tokens")
        if self.teacher is not None and not self.kl + self.hidden:
            raise UserError("with --kl 0 and --hidden 0 the teacher teaches nothing; leave it out, or set one of them above 0")
        if (self.steps is None) == (self.alpha is None):
            raise UserError("how long to train: give --steps, or --alpha with --original-tokens, and not both")

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        tokens = (self.alpha or 0.0) * (self.original_tokens or 0.0)
        return max(1, math.ceil(tokens / (self.batch * self.window)))

    def rate(self, step: int) -> float:
        """The learning rate of `step` (from 0): up to the peak in a straight line, then a cosine down to a tenth of it."""
        peak = RATES[self.optimizer] if self.lr is None else self.lr
        warm = math.ceil(self.warmup * self.total_steps)
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, self.total_steps - warm)
        return peak * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2)

    def share(self, processes: int) -> tuple[int, int]:
        """Windows of a batch that each of `processes` has, and those it takes at once. Raises UserError."""
        if self.batch % processes:
            raise UserError(f"a batch of {self.batch} windows does not divide among {processes} processes; choose a multiple")
        share = self.batch // processes
        micro = min(self.micro_batch or share, share)
        if share % micro:
            raise UserError(f"--micro-batch {micro} does not divide the {share} windows of a batch that a process has")
        return share, micro

    def identity(self) -> dict[str, Any]:
        """What must be the same in every call of one run."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in CHANGEABLE}
