"""Whole conversions: transformers loads what comes out, exactness, what calibration improves, seeds, and refusals."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import hf
import numpy as np
import pytest
import torch

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.convert import METHODS, Converter, conversion_record, convert_checkpoint, convert_weights
from exporter.convert import calibration as calibrating
from exporter.convert.attention import AttentionWeights
from exporter.convert.calibrate import convert_layer
from exporter.convert.causal import CausalAttention
from exporter.convert.methods import held, layer_change
from exporter.convert.scratch import Scratch
from exporter.engines import open_session
from exporter.errors import CheckpointError, UserError
from exporter.export import ExportOptions, export
from exporter.models.decoder import Decoder
from exporter.weights import ComputedTensor, Weights

FOLDING = ("procrustes", "optimal")
TOKENS = np.random.default_rng(1).integers(0, 67, (6, 48))
NAMES = [name for name, (_, changes) in hf.MODELS.items() if changes.get("num_key_value_heads") != 1]


def logits(checkpoint: Checkpoint, tokens: np.ndarray = TOKENS) -> torch.Tensor:
    model = Decoder.from_weights(checkpoint.config, checkpoint.weights)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model(torch.from_numpy(tokens), positions, model.empty_cache(*tokens.shape))[0]


def with_heads(checkpoint: Checkpoint, kv_heads: Any, method: Any = "mean", **options: Any) -> Checkpoint:
    config, weights = convert_weights(checkpoint.config, checkpoint.weights, kv_heads, method, **options)
    return dataclasses.replace(checkpoint, config=config, weights=weights)


def divergence(checkpoint: Checkpoint, other: Checkpoint, tokens: np.ndarray) -> float:
    ours, theirs = (logits(each, tokens).double().log_softmax(-1) for each in (checkpoint, other))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("method", ["mean-renorm", *FOLDING])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_comes_out(name: str, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family: biases, partial rotary, tied or not. Our logits of what was written are transformers'."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(calibrating, "WINDOWS", 2)
    monkeypatch.setattr(calibrating, "WINDOW", 24)
    options = {"grouping": "best", "calibration": "random"} if method in FOLDING else {}
    source = hf.save(name, tmp_path)
    convert_checkpoint(source, tmp_path / "out", 1, method, **options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").float().eval()
    assert theirs.config.num_key_value_heads == 1
    ours = logits(open_checkpoint(tmp_path / "out"), TOKENS[:1])
    np.testing.assert_allclose(ours[0], hf.logits(theirs, TOKENS[0]), rtol=0, atol=5e-4)
    assert (ours - logits(open_checkpoint(source), TOKENS[:1])).abs().max() > 0.1


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["weights", "tokens"])
@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize("name", ["llama-tied-biased", "phi3-partial", "gemma", "starcoder2", "qwen3"])
def test_heads_repeated_are_found_again(name: str, method: Any, tokens: Any, tmp_path: Path) -> None:
    """Degrouped and converted back, nothing is lost; nor where they were dealt out in another order and groups are measured."""
    source = open_checkpoint(hf.save(name, tmp_path))
    before, G = logits(source), source.config.kv_heads[0]
    many = with_heads(source, 6)
    for grouping, given in (("contiguous", many), ("best", many), ("best", dealt_out(many, [3, 0, 5, 1, 4, 2]))):
        back = with_heads(given, G, method, grouping=grouping, tokens=tokens)
        assert back.config == source.config
        torch.testing.assert_close(logits(back), before, rtol=0, atol=1e-4 * float(before.abs().max()))


def dealt_out(checkpoint: Checkpoint, order: list[int]) -> Checkpoint:
    """With the KV heads of each layer, and the query heads that read them, in another order."""
    weights = dict(checkpoint.weights)
    for index in range(checkpoint.config.num_layers):
        layer = AttentionWeights.read(checkpoint.config, checkpoint.weights, index, torch.float32)
        tensors = layer.ordered(order).tensors(checkpoint.config, index)
        weights |= {name: held(name, tensor) for name, tensor in tensors.items()}
    return dataclasses.replace(checkpoint, weights=weights)


@pytest.mark.parametrize("method", FOLDING)
def test_a_layer_is_measured_on_converted_ones_before_it_and_fitted_to_the_original(method: Any, tmp_path: Path) -> None:
    """Its inputs and what it should give are taken from whole models here: with the first layer converted, and the original."""
    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    read = second_inputs(source)
    inputs = second_inputs(with_heads(source, (2, 6), method, tokens=TOKENS))
    assert (read - inputs).norm() > 0.05 * read.norm()  # the layer before makes a difference
    layer = AttentionWeights.read(source.config, source.weights, 1, torch.float32)
    attention, change = CausalAttention(source.config, TOKENS.shape[1]), layer_change(method, "contiguous", 0)
    expected, *_ = convert_layer(attention, source.config, layer, 2, change, read, inputs)
    found = with_heads(source, (2, 2), method, tokens=TOKENS)
    for name, tensor in expected.tensors(source.config, 1).items():
        # The fits start from inputs that differ by float32's rounding and end 2e-5 apart at most.
        torch.testing.assert_close(found.weights[name].read(), tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()))


def second_inputs(checkpoint: Checkpoint) -> torch.Tensor:
    """What the second layer's projections read of TOKENS: [n,T,d]."""
    model = Decoder.from_weights(checkpoint.config, checkpoint.weights)
    kept: list[torch.Tensor] = []
    model.layers[1].input_layernorm.register_forward_hook(lambda *given: kept.append(given[-1].detach()))
    positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
    model(torch.from_numpy(TOKENS), positions, model.empty_cache(*TOKENS.shape))
    return kept[0].view(*TOKENS.shape, -1)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_number_and_multiples_are_exact(method: Any, tmp_path: Path) -> None:
    source = open_checkpoint(hf.save("llama", tmp_path))
    same = with_heads(source, 2, method)
    assert all(same.weights[name] is tensor for name, tensor in source.weights.items())
    more = with_heads(source, 6, method)
    assert {name for name in more.weights if more.weights[name] is not source.weights[name]} == {
        f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "kv"
    }
    torch.testing.assert_close(logits(more), logits(source), rtol=0, atol=1e-5)


def test_layers_of_their_own(tmp_path: Path) -> None:
    """A layer that keeps its number keeps its tensors; one that gets more is exact."""
    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    for tokens in (None, TOKENS):
        mixed = with_heads(source, (6, 2), "optimal", tokens=tokens)
        changed = {name for name in mixed.weights if mixed.weights[name] is not source.weights[name]}
        assert changed == {f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkvo"}
        up = with_heads(with_heads(source, (2, 6)), (6, 3), "optimal", tokens=tokens)
        assert up.config.kv_heads == (6, 3)


def test_the_methods_in_their_order(tmp_path: Path) -> None:
    """On tokens that were not calibrated on: KL(original ‖ converted) of the next token, 6 → 2 KV heads."""
    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    calibration, held_out = np.random.default_rng(5).integers(0, 67, (2, 24, 48))
    found = {
        "mean": divergence(source, with_heads(source, 2), held_out),
        "weights": divergence(source, with_heads(source, 2, "optimal"), held_out),
        "procrustes": divergence(source, with_heads(source, 2, "procrustes", tokens=calibration), held_out),
        "optimal": divergence(source, with_heads(source, 2, "optimal", tokens=calibration), held_out),
        "best": divergence(source, with_heads(source, 2, "optimal", tokens=calibration, grouping="best"), held_out),
    }
    assert found["optimal"] < found["weights"] < found["mean"], found
    assert found["optimal"] < found["procrustes"] < found["mean"], found
    assert found["best"] < 1.1 * found["optimal"], found  # groups are chosen by what sharing loses, not by this divergence


def test_mean_renorm_keeps_norms(tmp_path: Path) -> None:
    source = open_checkpoint(hf.save("llama-tied-biased", tmp_path))
    mean, renormed = (with_heads(source, 1, method).weights for method in ("mean", "mean-renorm"))
    for kind in "kv":
        name = f"model.layers.1.self_attn.{kind}_proj"
        old = source.weights[name + ".weight"].read().double().numpy().reshape(2, -1)
        new = renormed[name + ".weight"].read().double().numpy()
        assert np.linalg.norm(new) == pytest.approx(np.sqrt((old**2).sum(1).mean()), rel=1e-6)
        gain = new / mean[name + ".weight"].read().numpy()
        np.testing.assert_allclose(gain, gain[0, 0], rtol=1e-4)
        np.testing.assert_allclose(
            renormed[name + ".bias"].read(), mean[name + ".bias"].read() * gain[0, 0], rtol=1e-4, atol=1e-6
        )


def test_weights_keep_their_dtypes(tmp_path: Path) -> None:
    source = open_checkpoint(hf.save("llama", tmp_path))
    half: Weights = {
        name: ComputedTensor(name, torch.bfloat16, tensor.shape, lambda tensor=tensor: tensor.read().bfloat16())  # type: ignore[misc]
        for name, tensor in source.weights.items()
    }
    for tokens in (None, TOKENS):
        config, converted = convert_weights(source.config, half, 1, "optimal", tokens=tokens)
        assert config.kv_heads == (1, 1)
        assert {tensor.read().dtype for tensor in converted.values()} == {torch.bfloat16}


def test_seeds_and_sources(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "WINDOWS", 3)
    monkeypatch.setattr(calibrating, "WINDOW", 20)
    (tmp_path / "text").write_text("abcdefghij" * 9)
    for source in ("self", "random", str(tmp_path / "text")):
        drawn = [calibrating.calibration_tokens(checkpoint, source, seed) for seed in (0, 0, 1)]
        assert drawn[0].shape == (3, 20)
        assert drawn[0].dtype == np.int64
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert np.array_equal(drawn[0], drawn[2]) == source.endswith("text")
    assert calibrating.calibration_tokens(checkpoint, "none") is None
    text = calibrating.windows(np.arange(100), 20, 3, "text")
    np.testing.assert_array_equal(text[:, 0], [0, 40, 80])


def test_a_converter_works_once_for_each_count(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "WINDOW", 16)
    convert = Converter(checkpoint, "optimal", calibration="random")
    assert convert(1) is convert((1, 1))
    assert convert.calibration == "random"
    assert Converter(checkpoint, "optimal").calibration == "self"
    assert Converter(checkpoint, "mean").calibration is None


def test_export_takes_the_same_methods(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported graph's logits are those of the weights that `convert_weights` makes of the same tokens."""
    monkeypatch.setattr(calibrating, "WINDOWS", 2)
    monkeypatch.setattr(calibrating, "WINDOW", 16)
    options = ExportOptions(groups=(2, 1), method="optimal", calibration="random", seed=3)
    bundle = export(checkpoint, tmp_path / "out", options)
    records = {variant.name: variant.conversion for variant in bundle.variants}
    assert records["g2"] is None
    assert records["g1"] == {
        "method": "optimal",
        "grouping": "contiguous",
        "calibration": "random",
        "seed": 3,
        "kv_heads_before": [2, 2],
        "kv_heads_after": [1, 1],
    }
    tokens = calibrating.calibration_tokens(checkpoint, "random", 3)
    expected = logits(with_heads(checkpoint, 1, "optimal", seed=3, tokens=tokens), TOKENS[:1])[0, -1]
    with open_session(bundle, bundle.variant("g1"), batch=1, capacity=60, threads=1) as session:
        np.testing.assert_allclose(session.prefill([TOKENS[0]])[0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["weights", "tokens"])
def test_qk_norm_averages_keys_and_folds_values(tokens: Any, tmp_path: Path) -> None:
    """K as the mean has it, queries untouched; V and W_O folded, which loses less than averaging both."""
    source = open_checkpoint(hf.save("qwen3", tmp_path))
    mean, folded = with_heads(source, 1), with_heads(source, 1, "optimal", tokens=tokens)
    for layer in range(source.config.num_layers):
        for kind, expected in (("q", source), ("k", mean)):
            name = f"model.layers.{layer}.self_attn.{kind}_proj.weight"
            torch.testing.assert_close(folded.weights[name].read(), expected.weights[name].read(), rtol=1e-5, atol=1e-6)
    held_out = np.random.default_rng(8).integers(0, 67, (12, 48))
    assert divergence(source, folded, held_out) < 0.9 * divergence(source, mean, held_out)
    record = conversion_record(source.config, folded.config, "optimal")
    assert record is not None
    assert record["keys"] == "mean"


def spoilt(checkpoint: Checkpoint, kind: str, value: float) -> Weights:
    """One matrix of layer 1 made `value` as a whole, or, where that is no number, in one place."""
    name = f"model.layers.1.self_attn.{kind}_proj.weight"
    matrix = checkpoint.weights[name].read()
    matrix = torch.full_like(matrix, value) if np.isfinite(value) else matrix.index_put((torch.tensor(3),), torch.tensor(value))
    return {**checkpoint.weights, name: held(name, matrix)}


@pytest.mark.parametrize("tokens", [None, TOKENS[:2, :24]], ids=["weights", "tokens"])
@pytest.mark.parametrize("grouping", ["contiguous", "best"])
@pytest.mark.parametrize("method", FOLDING)
def test_weights_that_are_no_weights(method: Any, grouping: Any, tokens: Any, tmp_path: Path) -> None:
    """All zero: whole. Beyond what float32 can multiply, NaN, infinite: finite weights, or one line that names the place."""
    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    for kind, value in itertools.product("qkvo", (0.0, 1e30, 1e38, float("nan"), float("inf"))):
        weights, refused = spoilt(source, kind, value), ""
        try:
            _, converted = convert_weights(source.config, weights, 2, method, grouping=grouping, tokens=tokens)
            assert all(tensor.read().isfinite().all() for tensor in converted.values()), (kind, value)
        except CheckpointError as error:
            refused = str(error)
            assert "\n" not in refused
        if not np.isfinite(value):
            assert f"'model.layers.1.self_attn.{kind}_proj.weight' holds NaN or infinite values" in refused
        elif refused:
            assert value >= 1e30
            assert refused.startswith("layer 1 cannot be converted by least squares"), (kind, value)


def test_nothing_of_a_converted_layer_stays_in_memory(tmp_path: Path) -> None:
    """Converted layers lie in a file that has no name, and come back as they were, in any order."""
    before = set(Path(tempfile.gettempdir()).iterdir())
    scratch = Scratch()
    values = {str(dtype): torch.randn(5, 7).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    kept = {name: scratch.keep(name, value) for name, value in values.items()}
    assert set(Path(tempfile.gettempdir()).iterdir()) == before
    for name in reversed(kept):
        assert torch.equal(kept[name].read(), values[name])
        assert kept[name].dtype == values[name].dtype


def test_mistakes(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = checkpoint.config, checkpoint.weights
    with pytest.raises(UserError, match="grouping 'nearest' is not one of contiguous, best"):
        convert_weights(config, weights, 1, "optimal", grouping="nearest")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="method mean makes no use of grouping best; leave it out, or choose from procrustes, op"
    ):
        convert_weights(config, weights, 1, "mean", grouping="best")
    with pytest.raises(UserError, match="method first makes no use of calibration self; leave it out"):
        Converter(checkpoint, "first", calibration="self")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        convert_weights(config, {}, 1, "optimal")

    def refused(source: str) -> str:
        with pytest.raises(UserError) as caught:
            calibrating.calibration_tokens(checkpoint, source)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("slef") == (
        "calibration 'slef' cannot be read: No such file or directory; choose from self, random, none, or a text file"
    )
    (tmp_path / "short").write_text("abc")
    assert refused(str(tmp_path / "short")).endswith(
        "short has 3 tokens, calibration needs at least 128; choose a longer text, or self"
    )
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert refused(str(tmp_path / "binary")).endswith("binary is not UTF-8 text")
    bare = dataclasses.replace(checkpoint, side_files={})
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        calibrating.calibration_tokens(bare, str(tmp_path / "short"))
