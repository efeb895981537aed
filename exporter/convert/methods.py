"""A conversion as a whole: every method and grouping, on lazy weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from exporter.config import ModelConfig
from exporter.convert.attention import AttentionWeights, attention_shapes, check_attention
from exporter.convert.calibrate import Progress, convert_on_tokens
from exporter.convert.gates import gated_config, with_gates
from exporter.convert.heads import Pooling, pooled_tensors
from exporter.convert.layer import LayerChange, check_finite, expected_moments, query_moments, solvable
from exporter.convert.seq2seq import attention_views, changed, check_fits, default_calibration
from exporter.convert.sharing import aligned, leading
from exporter.errors import UserError, one_of
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import ComputedTensor, LazyTensor, Weights

Method = Literal["mean", "first", "random", "mean-renorm", "procrustes", "optimal"]
METHODS: tuple[Method, ...] = get_args(Method)
SHARINGS = {"procrustes": aligned, "optimal": leading}  # the methods that fold into W_Q and W_O
REPETITION = "repetition"  # exact, whatever the method that was named
Grouping = Literal["contiguous", "best"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


def convert_weights(
    config: ModelConfig,
    weights: Weights,
    kv_heads: int | tuple[int, ...],
    method: Method = "mean",
    seed: int = 0,
    *,
    grouping: Grouping = "contiguous",
    tokens: np.ndarray | None = None,
    progress: Progress = lambda what, done, total: None,
    glu_value_dim: int | None = None,
) -> tuple[ModelConfig, Weights]:
    """The model with `kv_heads` KV heads in every layer, or one number a layer.

    With `glu_value_dim` it also gets GLU attention, with values of so many channels (exporter/convert/gates.py).

    The pooling methods are exporter/convert/heads.py. `procrustes` aligns the heads of a group before it averages them,
    `optimal` loses least in the second moments of what layers read (exporter/convert/sharing.py); both fold what heads differ
    in into W_Q and W_O (exporter/convert/fold.py). `grouping` best lets them choose which heads share, too. QK-norm
    lets nothing into W_Q: there both average K, and fold V alone.

    tokens, int64 [n,T], are n windows of text to measure those moments on; `optimal` then also corrects each layer by least
    squares (exporter/convert/refine.py), all of it now. Without tokens only the weights decide, when tensors are read.
    Layers that keep their number keep their tensors. Raises UserError for a count that does not divide the query heads and a
    method that does not fit the model, CheckpointError where a projection is missing or has another shape than the config says.
    """
    check_method(config, method, seed, grouping, None if tokens is None else "tokens")
    target = config.with_kv_heads(kv_heads)
    if isinstance(config, Seq2SeqConfig):
        made = dict(weights)
        for names, plain, view in attention_views(config, weights):
            found = convert_weights(plain, view, target.kv_heads, method, seed, grouping=grouping)[1]
            made |= changed(names, view, found)
        return target, made
    if glu_value_dim is not None:
        final = gated_config(target, glu_value_dim)
        narrower = None if glu_value_dim == config.head_dim else glu_value_dim
        converted = _convert(config, weights, target, method, seed, grouping, tokens, progress, narrower)
        return final, with_gates(final, converted)
    return target, _convert(config, weights, target, method, seed, grouping, tokens, progress, None)


def _convert(
    config: ModelConfig,
    weights: Weights,
    target: ModelConfig,
    method: Method,
    seed: int,
    grouping: Grouping,
    tokens: np.ndarray | None,
    progress: Progress,
    value_dim: int | None,
) -> Weights:
    """The weights of `target`, the values of a head in `value_dim` channels where that is given."""
    if value_dim is not None and method != "optimal":
        raise UserError(
            f"method {method} keeps the {config.head_dim} channels of a value; choose optimal for values of {value_dim}"
        )
    if method not in SHARINGS or (is_exact(config, target) and value_dim is None):
        pooling: Pooling = "mean" if method == "procrustes" or method == "optimal" else method
        return {**weights, **pooled_tensors(config, weights, target, pooling, seed)}
    check_attention(config, weights)
    change = layer_change(method, grouping, seed, value_dim)
    if tokens is None:
        return {**weights, **_folded_tensors(config, weights, target, change)}
    return {**weights, **convert_on_tokens(config, weights, target, change, tokens, progress)}


def layer_change(method: Method, grouping: Grouping, seed: int, value_dim: int | None = None) -> LayerChange:
    """What a method that folds does to one layer."""
    return LayerChange(SHARINGS[method], grouping == "best", method == "optimal", seed, value_dim)


def conversion_record(
    before: ModelConfig,
    after: ModelConfig,
    method: Method,
    seed: int = 0,
    grouping: Grouping = "contiguous",
    calibration: str | None = None,
) -> dict[str, Any] | None:
    """What a manifest says of a conversion: how, and KV heads per layer. None where no head changed.

    Where heads were only repeated, no method had a part in it: it is REPETITION.
    """
    counts: dict[str, Any] = {"kv_heads_before": list(before.kv_heads), "kv_heads_after": list(after.kv_heads)}
    if before.glu_value_dim != after.glu_value_dim:
        counts["glu_value_dim"] = after.glu_value_dim
    elif before.kv_heads == after.kv_heads:
        return None
    if is_exact(before, after) and before.value_dim == after.value_dim:
        return {"method": REPETITION, "seed": None, **counts}
    folded = {"grouping": grouping, "calibration": calibration or default_calibration(before)} if method in SHARINGS else {}
    if folded and before.qk_norm:
        folded["keys"] = "mean"  # QK-norm lets nothing of them be folded
    return {
        "method": method,
        **folded,
        "seed": seed if method == "random" or folded else None,
        **counts,
    }


def is_exact(before: ModelConfig, after: ModelConfig) -> bool:
    """Whether heads are only repeated, or not even that: nothing is lost, whatever the method."""
    return all(new % old == 0 for old, new in zip(before.kv_heads, after.kv_heads, strict=True))


def check_method(
    config: ModelConfig, method: str, seed: int, grouping: str, calibration: str | None, quantised: bool = False
) -> None:
    """Refuse an unknown or unfitting way to convert this model. `calibration` is what tokens it was given, if any; where it
    will be `quantised`, they serve for that, too."""
    for what, value, choices in (("method", method, METHODS), ("grouping", grouping, GROUPINGS)):
        if value not in choices:
            raise UserError(one_of(what, value, choices))
    check_fits(config, grouping, calibration)
    if seed < 0:
        raise UserError(f"seed {seed} is negative; choose a whole number from 0")
    idle = calibration is not None and not quantised
    if method not in SHARINGS and (grouping != "contiguous" or idle):
        what = f"calibration {calibration}" if idle else f"grouping {grouping}"
        raise UserError(f"method {method} makes no use of {what}; leave it out, or choose from {', '.join(SHARINGS)}")


def _folded_tensors(config: ModelConfig, weights: Weights, target: ModelConfig, change: LayerChange) -> dict[str, LazyTensor]:
    """Computed when read; a layer is computed once for its tensors when they are read in turn."""

    @functools.lru_cache(maxsize=1)
    def computed(layer: int) -> dict[str, Tensor]:
        moments = expected_moments(config, weights, layer)
        before = AttentionWeights.read(config, weights, layer, torch.float64)
        before = replace(before, asking=query_moments(config, weights, layer))
        with solvable(layer):
            ordered = change.regroup(config, before, target.kv_heads[layer], moments)
            folded = change.fold(config, ordered, target.kv_heads[layer], moments)
            check_finite(folded)
        return folded.tensors(config, layer)

    def reader(layer: int, name: str) -> Callable[[], Tensor]:
        return lambda: computed(layer)[name]

    folded_tensors: dict[str, LazyTensor] = {}
    for layer, (before, after) in enumerate(zip(config.kv_heads, target.kv_heads, strict=True)):
        if change.keeps(before, after):
            continue
        after_shapes = attention_shapes(target if change.value_dim is None else gated_config(target, change.value_dim), layer)
        for name, shape in after_shapes.items():
            if name not in weights:  # of the gates, which are not made of what there is
                continue
            folded_tensors[name] = ComputedTensor(name, weights[name].dtype, shape, reader(layer, name))
    return folded_tensors


def held(name: str, tensor: Tensor) -> LazyTensor:
    """A tensor in memory as a lazy one."""
    return ComputedTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)
