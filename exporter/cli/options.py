"""Options that several commands share, so that a word means one thing everywhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

# Written out here because the modules that define them import torch or onnx; a test holds them equal.
METHODS = ("mean", "first", "random", "mean-renorm", "procrustes", "optimal")
GROUPINGS = ("contiguous", "best")
PATTERNS = ("repeat", "grouped", "attention", "gqa", "fused")
CACHES = ("concat", "static")
DTYPES = ("fp32", "fp16", "bf16")
QUANTIZE = ("int8", "int8-zp", "int8-128", "int8-128-zp", "int4", "int4-zp", "int4-128", "int4-128-zp")
CACHE_DTYPES = ("fp16", "int8")
FFN_KINDS = ("relu", "gelu", "swish", "glu", "bilinear", "reglu", "geglu", "swiglu")
BACKENDS = (
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
)


class IntList(click.ParamType):
    """Whole numbers above zero, separated by commas."""

    name = "N,N,…"
    least = 1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 8,4,1", param, ctx)
        if min(numbers) < self.least:
            self.fail(f"{value!r} holds {min(numbers)}; the numbers start at {self.least}", param, ctx)
        return numbers


class IdList(IntList):
    """Token ids: whole numbers from zero, separated by commas."""

    least = 0


class ChoiceList(click.ParamType):
    """Words out of a closed set, separated by commas."""

    name = "NAME,NAME,…"

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(str(value).split(","))
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}", param, ctx)
        return words


class OneOf(click.Choice):
    """A word out of a closed set, refused in the words of the rest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            self.fail(f"{value!r} is not one of {', '.join(self.choices)}", param, ctx)
        return value


Option = Callable[[Callable[..., Any]], Callable[..., Any]]

as_json: Option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
groups: Option = click.option(
    "--groups", type=IntList(), help="Numbers of KV heads G of GQA-G: 1 is MQA, the query heads' number is MHA."
)
method: Option = click.option(
    "--method", type=OneOf(METHODS), default="mean", show_default=True, help="How the heads of a group become one."
)
select_method: Option = click.option(
    "--method", type=OneOf(METHODS), default="optimal", show_default=True, help="How the heads of a group become one."
)
plan: Option = click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="What select wrote: KV heads for each layer, and the way to convert unless --method is given.",
)
grouping: Option = click.option(
    "--grouping",
    type=OneOf(GROUPINGS),
    default="contiguous",
    show_default=True,
    help="Which heads share: neighbours, or those that lose least (procrustes, optimal).",
)
calibration: Option = click.option(
    "--calibration",
    metavar="FILE|self|random|none",
    help="Tokens that procrustes and optimal measure on: a text's, the model's own, or random ones.  [default: self]",
)
every_calibration: Option = click.option(
    "--calibration",
    metavar="FILE|self|random|none",
    help="Tokens to measure on, a text's, the model's own, or random ones: what procrustes and optimal convert by "
    "[default: self], and what --quantize rounds by, where there are any.",
)
seed: Option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all randomness.")
patterns: Option = click.option(
    "--pattern",
    "--patterns",
    "patterns",
    type=ChoiceList(PATTERNS),
    default="grouped",
    show_default=True,
    help=f"What the attention becomes: {', '.join(PATTERNS)}.",
)
cache: Option = click.option(
    "--cache", type=OneOf(CACHES), help="Cache form.  [default: concat for repeat, static for the others]"
)
dtype: Option = click.option(
    "--dtype", type=OneOf(DTYPES), default="fp32", show_default=True, help="Of weights, activations and cache."
)
backend: Option = click.option(
    "--backend", type=OneOf(BACKENDS), default="onnxruntime", show_default=True, help="Runtime to use."
)
engine_weights: Option = click.option(
    "--engine-weights",
    type=OneOf(("int8", "int4", "fp8")),
    help="Of a TensorRT backend: the engine that build made with these.  [default: plain weights first]",
)
threads: Option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of one operator.  [default: one a physical core]"
)
quantize: Option = click.option(
    "--quantize",
    type=OneOf(QUANTIZE),
    metavar="int8|int4[-128][-zp]",
    help="Store the matrices so, for ONNX Runtime: blocks of 32, or of up to 128, share a scale, and with zp a zero point.",
)
cache_dtype: Option = click.option(
    "--cache-dtype",
    type=OneOf(CACHE_DTYPES),
    help="Store the caches so, int8 with a scale for each row: pattern fused.  [default: as --dtype]",
)
storage: Option = click.option(
    "--weights",
    "storage",
    type=OneOf(("copy", "link")),
    default="copy",
    show_default=True,
    help="link: hard-link the checkpoint's own files where their bytes serve as they are.",
)


def all_of(*options: Option) -> Option:
    """Several options as one decorator, in the order they are named."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


converting = all_of(method, grouping, calibration)
making = all_of(groups, plan, method, grouping, every_calibration, patterns, cache, dtype, quantize, cache_dtype, storage)
running = all_of(backend, threads)
engines = all_of(running, engine_weights)  # what also runs engines of headpool build

T = TypeVar("T")


def build(cls: type[T], given: dict[str, Any]) -> T:
    """The dataclass `cls` from those of a command's options that are its fields; the other fields keep their defaults."""
    return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given})  # type: ignore[arg-type]
