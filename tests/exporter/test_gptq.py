"""Rounding on calibration tokens: the algorithm against the textbook's, whole models against themselves, and refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import hf
import numpy as np
import pytest
import tiny
import torch
from onnxruntime.quantization.neural_compressor import weight_only
from safetensors.torch import load_file

from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.checkpoint.expected import EMBEDDING, HEAD
from exporter.cli import _run
from exporter.config import RopeConfig
from exporter.convert import Converter, stage
from exporter.convert import calibration as calibrating
from exporter.engines import open_session
from exporter.engines.torch_eager import open_torch
from exporter.errors import CheckpointError
from exporter.export import ExportOptions, export
from exporter.inspection import inspect, render
from exporter.models.decoder import Decoder
from exporter.quantise import QUANTIZE, Quantiser, restored
from exporter.quantise.blocks import dequantise, quantise
from exporter.quantise.gptq import DAMPING, gptq, inverse_factor
from exporter.weights import ComputedTensor, Weights
from graphs.quantise import FORMS, Form

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {}),
    "normed-qk": ("qwen3", {}),
    "plain-ffn": ("starcoder2", {"tie_word_embeddings": False}),
    "scaled-embedding": ("gemma", {}),
}

INT4 = FORMS["int4"]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "WINDOWS", 8)
    monkeypatch.setattr(calibrating, "WINDOW", 32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (family, changes) in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        hf.build(family, {**SIZES, **changes}).save_pretrained(made[name])
    return made


def correlated(rows: int, K: int) -> torch.Tensor:
    """Inputs [rows,K] as a model has them: few directions hold most, and some channels are much larger than others."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    return (mixed + 0.3 * torch.randn(rows, K, generator=generator)) * torch.rand(K, generator=generator).add(0.1)


def weight_of(N: int, K: int) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


def error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    """‖x (W − Ŵ)ᵀ‖², the mean over tokens, in float64."""
    return float((inputs.double() @ (weight - rounded).double().T).square().sum() / len(inputs))


def textbook(weight: np.ndarray, moments: np.ndarray, scales: np.ndarray, zeros: np.ndarray, form: Form) -> np.ndarray:
    """Optimal Brain Quantization column by column in float64 (Frantar & Alistarh 2022, equations 2 and 3): the inverse Hessian
    of the columns that are left by elimination, and no factor of anything. Scales and zeros [N,blocks] are given."""
    w, rounded = weight.astype(np.float64), np.zeros(weight.shape)
    inverse = np.linalg.inv(moments + DAMPING * np.diag(moments).mean() * np.eye(len(moments)))
    for i in range(w.shape[1]):
        scale, zero = scales[:, i // form.block].astype(np.float64), zeros[:, i // form.block]
        rounded[:, i] = (np.clip(np.round(w[:, i] / scale) + zero, 0, 2**form.bits - 1) - zero) * scale
        w -= np.outer((w[:, i] - rounded[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i] = inverse[:, i] = 0
        inverse[i, i] = 1  # never read again
    return rounded


@pytest.mark.parametrize("kind", QUANTIZE)
def test_it_is_the_textbooks(kind: str) -> None:
    """In float32, so a value in the middle between two levels may go the other way, and what follows it in its row with it."""
    form = FORMS[kind]
    K = 4 * form.block
    inputs, weight = correlated(4 * K, K), weight_of(40, K)
    moments = inputs.T @ inputs / len(inputs)
    exact = moments.double().numpy()
    parts = gptq(weight, inverse_factor(moments), form)
    zeros = np.full((40, 4), 2 ** (form.bits - 1))
    if form.zeros:
        zeros = parts[2].numpy() if form.bits == 8 else np.stack((parts[2] & 15, parts[2] >> 4), axis=2).reshape(40, 4)
    wanted = textbook(weight.numpy(), exact, parts[1].numpy(), zeros, form)
    rows = np.isclose(dequantise(parts, form).numpy(), wanted, rtol=1e-4, atol=1e-5).all(axis=1)
    assert rows.sum() >= 38, rows


@pytest.mark.parametrize("kind", QUANTIZE)
def test_its_scales_lose_least(kind: str) -> None:
    """Of those that are tried, by how much the inputs of each column hold; one value after the other in float64. Inputs that do
    not correlate: no column is changed before its turn."""
    form = FORMS[kind]
    weight, held = weight_of(6, form.block), torch.rand(form.block, generator=torch.Generator().manual_seed(7))
    rounded = dequantise(gptq(weight, inverse_factor(torch.diag(held)), form), form)
    middle, top = 2 ** (form.bits - 1), 2**form.bits - 1
    for row, found in zip(weight.double().tolist(), rounded.double().tolist(), strict=True):
        low, high = min(*row, 0), max(*row, 0)
        scale, zero = (high - low) / top if form.zeros else max(row, key=abs) / -middle, middle
        zero = round(-low / scale) if form.zeros else middle
        tried = []
        for step in [scale * share for share in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1.05)]:
            values = [(min(max(round(w / step) + zero, 0), top) - zero) * step for w in row]
            damped = (held + DAMPING * held.mean()).tolist()
            tried.append((sum(d * (w - v) ** 2 for d, w, v in zip(damped, row, values, strict=True)), values))
        np.testing.assert_allclose(found, min(tried)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTIZE)
def test_it_keeps_outputs_better(kind: str) -> None:
    """On correlated inputs much better than the nearest, on others of the kind, too, and no worse than ONNX Runtime's GPTQ."""
    form = FORMS[kind]
    both, weight = correlated(4000, 256), weight_of(96, 256)
    inputs, others = both[:2000], both[2000:]
    moments = inputs.T @ inputs / len(inputs)
    nearest = dequantise(quantise(weight, form), form)
    how = {"num_bits": form.bits, "group_size": form.block, "scheme": "asym" if form.zeros else "sym"}
    theirs = weight_only.gptq(weight.T.double().numpy().copy(), moments.double().numpy(), **how)
    found = dequantise(gptq(weight, inverse_factor(moments), form), form)
    assert error(weight, found, inputs) < 0.5 * error(weight, nearest, inputs)
    assert error(weight, found, others) < 0.5 * error(weight, nearest, others)
    assert error(weight, found, inputs) < 1.05 * error(weight, torch.from_numpy(theirs.T), inputs)


@pytest.mark.parametrize("kind", QUANTIZE)
def test_without_correlation_nothing_is_made_good(kind: str) -> None:
    """Every value is at the level of its block that is nearest to it; inputs that are always zero are no trouble."""
    form = FORMS[kind]
    K = 3 * form.block
    weight = weight_of(24, K)
    weight[3, form.block : 2 * form.block] = 0
    for diagonal in (torch.ones(K), torch.rand(K), torch.zeros(K)):
        parts = gptq(weight, inverse_factor(torch.diag(diagonal)), form)
        steps = parts[1].abs().repeat_interleave(form.block, 1)
        moved, inside = (dequantise(parts, form) - weight).abs(), weight.abs() < (2 ** (form.bits - 1) - 1) * steps
        if not form.zeros:
            assert (moved <= 0.5001 * steps)[inside].all()
        assert (moved <= 0.5001 * steps).float().mean() > 0.9
        assert (dequantise(parts, form)[3, form.block : 2 * form.block] == 0).all()


@pytest.fixture(scope="module")
def checkpoints(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {
        **{name: open_checkpoint(folder) for name, folder in folders.items()},
        "gated-values": gated_values(tmp_path_factory.mktemp("gated-values")),
    }


def gated_values(folder: Path) -> Checkpoint:
    """GLU attention and learned positions, large random weights."""
    changes = {"glu_value_dim": 8, "rope": RopeConfig(kind="none"), "learned_positions": True, "norm": "layer", "ffn": "relu"}
    config = dataclasses.replace(
        tiny.CONFIG, kv_heads=(2, 2), hidden_size=64, intermediate_size=96, num_heads=4, tied=True, **changes
    )
    described = {key: value for key, value in config.to_json().items() if key != "family"}
    (folder / "config.json").write_text(json.dumps({"model_type": "headpool", **described}))
    source = open_source(folder / "config.json")
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, tensor in source.weights.items():
        value = torch.randn(tensor.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        weights[name] = ComputedTensor(name, value.dtype, tensor.shape, lambda value=value: value)
    return dataclasses.replace(source, weights=weights)


@pytest.mark.parametrize("name", [*MODELS, "gated-values"])
def test_each_is_rounded_for_what_it_reads(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    """With the rounded weights in transformers' model (in ours where theirs has no such attention), what reaches each product
    on the calibration tokens is what it was rounded for: doing that once more gives the same. In every family: biases, QK-norm,
    FFNs without gates, GLU attention, learned positions, heads tied and not."""
    checkpoint = checkpoints[name]
    quantiser = Quantiser(Converter(checkpoint, calibration="random", quantised=True), "int4")
    values = {key: tensor.read() for key, tensor in restored(quantiser(2)[1], INT4).items()}
    head = EMBEDDING if checkpoint.config.tied else HEAD
    matrices = {key for key in values if key.endswith("_proj.weight")} | {head}
    rounded_head = values[head]
    values[EMBEDDING] = to_nearest(checkpoint.weights[EMBEDDING].read())  # what layers are calibrated on
    tokens = quantiser.convert.tokens()
    assert tokens is not None
    read = inputs_of(name, checkpoint, values, torch.from_numpy(tokens))
    assert read.keys() == {key if key != EMBEDDING else HEAD for key in matrices}
    for key in matrices:
        inputs, weight = read[HEAD if key == EMBEDDING else key], checkpoint.weights[key].read()
        found = rounded_head if key == head else values[key]
        wanted = dequantise(gptq(weight, inverse_factor(inputs.T @ inputs / len(inputs)), INT4), INT4)
        assert torch.isclose(found, wanted, rtol=1e-4, atol=1e-4).float().mean() > 0.99, key
        assert error(weight, found, inputs) < 0.95 * error(weight, to_nearest(weight), inputs), key


def to_nearest(weight: torch.Tensor) -> torch.Tensor:
    return dequantise(quantise(weight, INT4), INT4)


def inputs_of(
    name: str, checkpoint: Checkpoint, values: dict[str, torch.Tensor], tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Canonical name of each linear layer's weight → what it reads, [tokens,K], in a model of `values`."""
    read = {}

    def note(key: str, x: torch.Tensor) -> None:
        read[key] = x.flatten(0, -2)

    if name not in MODELS:
        held = {
            key: ComputedTensor(key, value.dtype, tuple(value.shape), lambda value=value: value)
            for key, value in values.items()
        }
        ours = Decoder.from_weights(checkpoint.config, held)
        for key, module in ours.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, x, key=key: note(f"model.{key}.weight", x[0]))
        ours.epilogue.norm.register_forward_hook(lambda _, __, y: note(HEAD, y))
        ours(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape), ours.empty_cache(*tokens.shape))
        return read
    family, changes = MODELS[name]
    theirs = hf.build(family, {**SIZES, **changes})
    state = theirs.state_dict()
    for key in state:
        if (canonical := canonical_name(key)) in values:
            state[key] = values[canonical]
    theirs.load_state_dict(state)
    for key, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, key=key: note(canonical_name(f"{key}.weight"), x[0]))
    with torch.no_grad():
        theirs(tokens, use_cache=False)
    return read


def canonical_name(theirs: str) -> str:
    return theirs.replace("mlp.c_fc", "mlp.up_proj").replace("mlp.c_proj", "mlp.down_proj")


def test_a_bundle_holds_what_was_calibrated(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """What sessions compute is what the rounded weights stand for, but for activations as int8; the embedding of a head that is
    not tied is shared, everything else each number of KV heads has for itself; and the manifest says how."""
    checkpoint = checkpoints["biased"]
    options = ExportOptions(
        groups=(2, 1), patterns=("fused", "grouped"), quantize="int4", calibration="random", seed=5, logits="all"
    )
    made = export(checkpoint, tmp_path / "out", options)
    assert made.variants[0].rounding == {"method": "gptq", "calibration": "random", "seed": 5}
    assert made.variants[0].precision == "fp32, int4 weights by GPTQ"
    assert made.variants[0].conversion is None
    assert "int4 weights by GPTQ" in "\n".join(render(inspect(tmp_path / "out")))
    shared = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in shared if "norm" not in name and "bias" not in name} == {
        f"{EMBEDDING}.int4",
        f"{EMBEDDING}.scales",
    }

    quantiser = Quantiser(Converter(checkpoint, "mean", 5, calibration="random", quantised=True), "int4")
    tokens = np.random.default_rng(1).integers(0, 67, 40)
    for groups in (2, 1):
        config, weights = quantiser(groups)
        stored = {**shared, **load_file(tmp_path / "out" / f"model.g{groups}.safetensors")}
        assert stored.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(stored[name], tensor.read()), name
        exact = logits(dataclasses.replace(checkpoint, config=config, weights=restored(weights, INT4)), tokens)
        plain = logits(dataclasses.replace(checkpoint, config=config, weights=converted(checkpoint, groups)), tokens)
        for pattern in ("fused", "grouped"):
            with open_session(made, made.variant(f"g{groups}.{pattern}"), capacity=64) as session:
                found = np.concatenate(list(session.score(tokens[None])), axis=1)[0]
            assert rms(found - exact) < 0.3 * rms(plain - exact), pattern


def converted(checkpoint: Checkpoint, groups: int) -> Weights:
    return Converter(checkpoint)(groups)[1]


def logits(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    with open_torch(checkpoint, capacity=64) as session:
        return np.concatenate(list(session.score(tokens[None])), axis=1)[0]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def test_methods_that_read_tokens_share_them(checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """`optimal` has tokens without being told, so rounding has them, too; `none` takes them from both."""
    drawn = []
    monkeypatch.setattr(stage, "calibration_tokens", lambda *given: drawn.append(given[1]) or np.ones((2, 32), np.int64))
    given = {"checkpoint": checkpoints["llama"], "quantised": True}
    assert Quantiser(Converter(**given), "int4").record == {"method": "nearest"}
    assert Quantiser(Converter(**given, method="optimal", calibration="none"), "int8").record == {"method": "nearest"}
    both = Quantiser(Converter(**given, method="optimal"), "int4")
    assert both.record == {"method": "gptq", "calibration": "self", "seed": 0}
    both(1)
    both(2)
    assert drawn == ["self"]


def test_mistakes(folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, nothing left."""
    folder = tmp_path / "llama"
    shutil.copytree(folders["llama"], folder)
    hf.add_tokenizer(folder)
    (tmp_path / "short").write_text("abc")
    cases = {
        ("--quantize", "int4", "--calibration", str(tmp_path / "short")): "has 3 tokens, calibration needs at least 32",
        ("--quantize", "int4", "--calibration", "slef"): "calibration 'slef' cannot be read: No such file or directory",
        ("--calibration", "self"): "method mean makes no use of calibration self; leave it out",
    }
    for arguments, message in cases.items():
        capfd.readouterr()
        assert _run(["export", str(folder), str(tmp_path / "out"), *arguments]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "short"]


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.nan, "^tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values; "),
        (
            1e30,
            "^model.layers.1.mlp.down_proj.weight cannot be calibrated: what it multiplies exceeds float32; export without ",
        ),
    ],
)
def test_a_damaged_weight_goes_by_its_name(
    factor: float, message: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints["llama"]
    name = "model.layers.1.mlp.up_proj.weight"
    whole = checkpoint.weights[name]
    broken = ComputedTensor(name, torch.float32, whole.shape, lambda: whole.read() * factor)
    checkpoint = dataclasses.replace(checkpoint, weights={**checkpoint.weights, name: broken})
    with pytest.raises(CheckpointError, match=message):
        export(checkpoint, tmp_path / "out", ExportOptions(quantize="int4", calibration="random"))
    assert not (tmp_path / "out").exists()
