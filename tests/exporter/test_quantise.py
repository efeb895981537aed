"""Bundles with int8 and int4 weights: what is stored, what it computes, what is shared, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hf
import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import matmul_nbits_quantizer

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.cli import _run
from exporter.convert import Converter
from exporter.engines import open_session
from exporter.errors import UserError
from exporter.export import ExportOptions, export
from exporter.quantise import QUANTIZE, Quantiser, restored
from exporter.quantise.blocks import dequantise, quantise
from exporter.weights import ComputedTensor
from graphs.quantise import BLOCK, FORMS

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {}),
    "plain-ffn": ("starcoder2", {"tie_word_embeddings": False}),
    "scaled-embedding": ("gemma", {}),
    "wide": ("llama", {"hidden_size": 128, "intermediate_size": 384, "tie_word_embeddings": True}),
}
PLAIN = ("int8", "int4")
CASES = [(name, kind) for name in MODELS for kind in (QUANTIZE if name == "wide" else PLAIN)] + [("llama", "int4-zp")]
TOKENS = np.random.default_rng(3).integers(0, 67, size=(2, 40))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (family, changes) in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        hf.build(family, {**SIZES, **changes}).save_pretrained(made[name])
    return made


def reference(name: str, kind: str, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """Logits [B,T,V] of transformers' model whose matrices went through int8 or int4 and back, as did in blocks of int8 what
    those layers read whose names end as in `rounded`."""
    family, changes = MODELS[name]
    theirs = hf.build(family, {**SIZES, **changes})
    for weight in (weight for weight in theirs.parameters() if weight.ndim == 2):
        weight.data = dequantise(quantise(weight.data, FORMS[kind]), FORMS[kind])
    for key, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and key.endswith(rounded):
            module.register_forward_pre_hook(lambda _, inputs: (as_int8(inputs[0]),))
    with torch.no_grad():
        return theirs(torch.from_numpy(TOKENS)).logits.numpy()


def as_int8(x: torch.Tensor) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits(name: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Against transformers with the same weights. Activations as int8 are asked of ONNX Runtime's operators, not prescribed;
    without that nothing but the order of sums differs. `fused` rounds where it has few rows, in the head always, and leaves
    forms other than the plain ones to ONNX Runtime's operators."""
    patterns = ("gqa", "grouped", "repeat", "fused")
    made = export(open_checkpoint(folders[name]), tmp_path / "out", ExportOptions(patterns=patterns, quantize=kind))
    exact = reference(name, kind)
    for variant in made.variants:
        path = made.graph_path(variant)
        if variant.pattern != "fused" or kind not in PLAIN:
            graph = onnx.load(path, load_external_data=False)
            levels = [a for node in graph.graph.node for a in node.attribute if a.name == "accuracy_level"]
            assert {level.i for level in levels} == {4}
            for level in levels:
                level.i = 1
            onnx.save(graph, path)
            session = open_session(made, variant, batch=2, capacity=64)
            found = [session.prefill([row[:37] for row in TOKENS]).copy()]
            found += [session.decode(TOKENS[:, at]).copy() for at in range(37, 40)]
            np.testing.assert_allclose(by_position(found), exact[:, 36:], atol=2e-4)
            continue
        # A value in the middle between two steps may go either way, and that is all that is left of a difference.
        session = open_session(made, variant, batch=2, capacity=64)
        many = by_position([session.prefill(list(TOKENS))])
        expected = reference(name, kind, rounded=("lm_head",))[:, 39:]
        assert rms(many - expected) < 0.002 * rms(expected)
        session.reset()
        few = [session.prefill([row[:12] for row in TOKENS]).copy()]
        few += [session.decode(TOKENS[:, at]).copy() for at in range(12, 20)]
        expected = reference(name, kind, rounded=("",))[:, 11:20]
        assert rms(by_position(few) - expected) < 0.01 * rms(expected)


def by_position(logits: list[np.ndarray]) -> np.ndarray:
    return np.stack([each.reshape(2, -1) for each in logits], axis=1)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.mark.parametrize("kind", QUANTIZE)
def test_the_numbers_are_those_of_onnxruntimes_quantiser(kind: str) -> None:
    form = FORMS[kind]
    weight = torch.randn(48, 4 * form.block, generator=torch.Generator().manual_seed(1))
    weight[5, form.block : 2 * form.block] = 0
    weight[7] = weight[7].abs()
    parts = quantise(weight, form)
    config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
        block_size=form.block, is_symmetric=not form.zeros, bits=form.bits
    )
    theirs = matmul_nbits_quantizer.DefaultWeightOnlyQuantizer(config)
    packed, their_scales, their_zeros = theirs.qbits_block_quant(np.ascontiguousarray(weight.T.numpy()))
    expected = [packed, their_scales, their_zeros] if form.zeros else [packed, their_scales]
    same = np.arange(48) != 5  # of a block of zeros any q will do
    for ours, wanted, shape in zip(parts, expected, form.shapes(*weight.shape), strict=True):
        assert ours.shape == shape
        different = (ours.numpy() != wanted.reshape(shape))[same]
        assert different.sum() <= (1 if ours is parts[0] else 0)  # theirs multiplies by 1 / scale: a tie may go the other way
    assert (dequantise(parts, form)[5, form.block : 2 * form.block] == 0).all()


@pytest.mark.parametrize("kind", QUANTIZE)
def test_how_far_a_weight_moves(kind: str) -> None:
    """At most half a step; without a zero the value opposite to the largest one, which has one level less, at most a whole one;
    with one, values at an end as much as the zero was rounded by besides."""
    form = FORMS[kind]
    weight = torch.randn(40, 3 * form.block, generator=torch.Generator().manual_seed(2))
    parts = quantise(weight, form)
    moved = (dequantise(parts, form) - weight).abs().reshape(40, -1, form.block)
    steps = moved / parts[1].abs().unsqueeze(2)
    assert steps.max() <= 1.0001
    assert (steps <= 0.5001).float().mean() > 0.97


def test_variants_share_their_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    options = ExportOptions(groups=(2, 1), patterns=("fused", "gqa"), quantize="int4")
    made = export(open_checkpoint(folders["llama"]), tmp_path / "out", options)
    files = sorted(path.name for path in made.path.glob("*.safetensors"))
    assert files == ["model.g1.safetensors", "model.g2.safetensors", "model.safetensors"]
    two, one = made.variant("g2.fused"), made.variant("g1.fused")
    matrices = 67 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert two.weight_bytes == matrices // 2 + matrices // 32 * 4 + 5 * 64 * 4
    assert two.weight_bytes - one.weight_bytes == 2 * 2 * 64 * 16 * 5 // 8
    assert made.variant("g2.gqa").weights == two.weights
    assert Bundle.open(made.path).variants[0].quantize == "int4"
    graph = onnx.load(made.graph_path(two), load_external_data=False).graph
    assert {node.op_type for node in graph.node} >= {"GatherBlockQuantized", "LinearChain", "FusedAttention"}


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    narrow = tmp_path / "narrow"
    hf.build("llama", {**SIZES, "intermediate_size": 40}).save_pretrained(narrow)
    cases = {
        (
            "int3",
            str(folders["llama"]),
        ): "'int3' is not one of int8, int8-zp, int8-128, int8-128-zp, int4, int4-zp, int4-128, int4-128-zp",
        ("int4", str(narrow)): "intermediate_size is 40, no multiple of 32; such a model cannot be quantised in blocks of 32",
    }
    for (kind, folder), message in cases.items():
        capfd.readouterr()
        assert _run(["export", folder, out, "--quantize", kind]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow"]


def test_a_damaged_weight_goes_by_the_name_it_has(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folders["llama"])
    name = "model.layers.1.mlp.up_proj.weight"
    whole = checkpoint.weights[name]
    broken = ComputedTensor(name, torch.float32, whole.shape, lambda: whole.read() * torch.nan)
    checkpoint = dataclasses.replace(checkpoint, weights={**checkpoint.weights, name: broken})
    with pytest.raises(UserError, match=f"^tensor '{name}' holds NaN or infinite values; "):
        export(checkpoint, tmp_path / "out", ExportOptions(patterns=("grouped",), quantize="int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", QUANTIZE)
def test_restored_weights_are_what_is_stored(kind: str, folders: dict[str, Path]) -> None:
    """What a sweep measures quality on. Where a width is no multiple of 128, blocks are of its largest power of two."""
    checkpoint, form = open_checkpoint(folders["llama"]), FORMS[kind]
    weights = restored(Quantiser(Converter(checkpoint, quantised=True), kind)(2)[1], form)
    assert weights.keys() == checkpoint.weights.keys()
    for name, tensor in weights.items():
        original = checkpoint.weights[name].read()
        matrix = name == "model.embed_tokens.weight" or "_proj" in name
        wanted = dequantise(quantise(original, form), form) if matrix else original
        assert torch.equal(tensor.read(), wanted), name
        assert torch.equal(wanted, original) != matrix
    blocks = [form.block_of(width) for width in (64, 96, 128, 576, 1536)]
    assert blocks == ([64, 32, 128, 64, 128] if "128" in kind else [32] * 5)
