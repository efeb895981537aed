"""KV heads of a T5's decoder: self- and cross-attention by every method, the encoder left alone."""

from __future__ import annotations

import numpy as np
import pytest
import t5
import torch

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.convert import METHODS, Converter, conversion_record, convert_weights
from exporter.convert.methods import held
from exporter.errors import UserError
from exporter.models.seq2seq import Seq2Seq
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.weights import Weights

KINDS = ("self_attn", "cross_attn")
CHANGED = {f"decoder.layers.{layer}.{kind}.{part}_proj.weight" for layer in range(3) for kind in KINDS for part in "kv"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(t5.save("t5-wide", tmp_path_factory.mktemp("wide")))


def logits(config: object, weights: Weights) -> torch.Tensor:
    assert isinstance(config, Seq2SeqConfig)
    model = Seq2Seq.from_weights(config, weights)
    source, target = torch.arange(23)[None] * 7 % 67, torch.arange(15)[None] * 5 % 67
    mask = torch.ones_like(source)
    return model(target, None, model.empty_cache(1, 0), model.cross_caches(model.encode(source, mask)), mask)[0][0]


def test_mean_pools_both_attentions_and_nothing_else(checkpoint: Checkpoint) -> None:
    config, weights = convert_weights(checkpoint.config, checkpoint.weights, 2)
    assert config.kv_heads == (2, 2, 2)
    assert list(weights) == list(checkpoint.weights)
    assert {name for name in weights if weights[name] is not checkpoint.weights[name]} == CHANGED
    for name in CHANGED:
        wanted = checkpoint.weights[name].read().unflatten(0, (2, 3, 16)).mean(1).flatten(0, 1)
        torch.testing.assert_close(weights[name].read(), wanted)
        assert weights[name].name == name


@pytest.mark.parametrize("method", METHODS)
def test_more_heads_are_exact_and_every_method_ends_in_numbers(method: str, checkpoint: Checkpoint) -> None:
    few = Converter(checkpoint, method)((1, 2, 3))  # type: ignore[arg-type]
    found = logits(*few)
    assert found.isfinite().all()
    torch.testing.assert_close(logits(*convert_weights(*few, 6)), found, rtol=0, atol=1e-4)


def test_keys_fold_with_any_matrix(checkpoint: Checkpoint) -> None:
    """Heads that are linear maps of one another lose nothing: no RoPE is in the way."""
    generator = torch.Generator().manual_seed(3)
    weights = dict(checkpoint.weights)
    for name in CHANGED:
        heads = weights[name].read().unflatten(0, (6, 16))[[0, 0, 1, 1, 2, 2]]
        maps = torch.eye(16) + torch.randn(6, 16, 16, generator=generator) * 0.2
        weights[name] = held(name, (maps @ heads).flatten(0, 1))
    wanted = logits(checkpoint.config, weights)
    found = logits(*convert_weights(checkpoint.config, weights, 3, "optimal"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    assert (logits(*convert_weights(checkpoint.config, weights, 3)) - wanted).abs().max() > 0.1


def test_cross_attention_is_measured_by_what_each_side_reads(checkpoint: Checkpoint) -> None:
    """Keys read the encoder's norm, queries the decoder's: scales of them that the projections undo change nothing."""
    weights = dict(checkpoint.weights)
    generator = torch.Generator().manual_seed(1)
    read, asked = (torch.exp(torch.randn(48, generator=generator)) for _ in range(2))

    def change(name: str, factor: torch.Tensor) -> None:
        weights[name] = held(name, weights[name].read() * factor)

    change("encoder.norm.weight", read)
    for prefix in (f"decoder.layers.{layer}" for layer in range(3)):
        change(f"{prefix}.cross_layernorm.weight", asked)
        change(f"{prefix}.cross_attn.q_proj.weight", 1 / asked)
        for part in "kv":
            change(f"{prefix}.cross_attn.{part}_proj.weight", 1 / read)
    found = logits(*convert_weights(checkpoint.config, weights, 2, "optimal"))
    wanted = logits(*convert_weights(checkpoint.config, checkpoint.weights, 2, "optimal"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)


def test_records_and_refusals(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    record = conversion_record(config, config.with_kv_heads(2), "optimal")
    assert record is not None
    assert record["calibration"] == "none"
    with pytest.raises(UserError, match="calibration self is for decoder-only models; an encoder-decoder is converted by"):
        Converter(checkpoint, "optimal", calibration="self")
    with pytest.raises(UserError, match="grouping best puts query heads in another order"):
        Converter(checkpoint, "optimal", grouping="best")
    with pytest.raises(UserError, match="calibration tokens is for decoder-only models"):
        convert_weights(config, checkpoint.weights, 2, "optimal", tokens=np.ones((1, 4), np.int64))
