"""An encoder-decoder's engines, built on a machine without a GPU: two a variant, recorded, kept, shown, refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import t5

from exporter.bundle import Bundle
from exporter.cli import _run
from exporter.engines import open_session
from exporter.engines.tensorrt import build as stage
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.errors import BundleError, EngineError

FOLDER = "tensorrt-rtx-sm86-sm89"
OPTIONS = BuildOptions(targets=("sm86", "sm89"), batch=2, capacity=32, prefill=24, variants=("g2.grouped",))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, pattern attention, from a config.json alone: 2 KV heads under 4 query heads of 16, and a tied head."""
    folder = tmp_path_factory.mktemp("half")
    config = {**t5.SIZES, "model_type": "t5", "d_kv": 16, "num_heads": 4, "d_ff": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    command = ["export", str(folder / "config.json"), str(folder / "bundle"), "--groups", "2", "--pattern", "attention"]
    assert _run([*command, "--dtype", "bf16"]) == 0
    return folder / "bundle"


def test_the_command_builds_both_and_inspect_shows_them(half, capsys):
    command = ["build", str(half), "--target", "sm86,sm89", "--capacity", "32", "--prefill", "24", "--json"]
    assert _run(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    encoder, decoder = report["engines"]
    assert [engine["file"] for engine in (encoder, decoder)] == ["encoder.s32.engine", "decoder.s32.engine"]
    assert [engine["part"] for engine in (encoder, decoder)] == ["encoder", "decoder"]
    for engine in (encoder, decoder):
        assert engine["profiles"] == [{"name": "input", "least": 1, "best": 24, "most": 24}]
        assert "[info]" in (half / "engines" / FOLDER / engine["log"]).read_text()
    assert (encoder["network"]["fused_attention"], decoder["network"]["fused_attention"]) == (2, 4)
    assert (encoder["network"]["heads"], decoder["network"]["heads"]) == ("4:4", "4:2")
    made, given = ({b["name"]: b for b in engine["bindings"]} for engine in (encoder, decoder))
    assert made["input_ids"]["shape"] == [1, -1]
    assert made["present.1.encoder.value"]["shape"] == [1, 2, -1, 16]
    assert given["past_key_values.1.encoder.value"]["shape"] == [1, 2, -1, 16]
    assert given["input_ids"]["shape"] == given["position_ids"]["shape"] == [1, 1]
    assert given["present.1.decoder.key"] == {
        "name": "present.1.decoder.key",
        "mode": "output",
        "dtype": "bf16",
        "shape": [1, 2, 32, 16],
        "alias": "past_key_values.1.decoder.key",
    }
    assert _run(command) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [engine["fresh"] for engine in again["engines"]] == [False, False]
    assert _run(["inspect", str(half)]) == 0
    out = capsys.readouterr().out
    assert "batch 1, inputs to 24\n    verified as it was built: 2 fused attention layers, heads 4:4" in out
    assert (
        "batch 1, 32 tokens, inputs to 24\n    verified as it was built: 4 fused attention layers, 4 caches in place, heads 4:2"
        in out
    )


def test_quantised_engines(half):
    """The embedding, which is the head as well, stays as it is."""
    options = BuildOptions(targets=("sm89",), capacity=32, prefill=24, quantize="int8")
    encoder, decoder = (built.record for built in build(Bundle.open(half), options))
    assert encoder.file == "encoder.s32.int8.engine"
    assert encoder.network.dequantised_weights == 2 * (4 + 2) + 2 * 2  # and what makes the decoder's cross caches
    assert decoder.network.dequantised_weights == 2 * (4 + 2 + 2)


def test_fp32_is_built_and_says_what_is_not_fused(pair, capsys):
    options = dataclasses.replace(OPTIONS, variants=("g2.attention",))
    encoder, decoder = (built.record for built in build(pair, options))
    assert (encoder.network.fused_attention, encoder.network.decomposable_attention) == (0, 2)
    assert (decoder.network.fused_attention, decoder.network.decomposable_attention) == (6, 0)
    assert _run(["inspect", str(pair.path)]) == 0
    assert (
        "verified as it was built: 2 attention layers that TensorRT may take apart (no fused kernel in fp32)"
        in capsys.readouterr().out
    )


def test_in_fp32_the_encoder_has_no_fused_kernel(pair, monkeypatch):
    """What the mark in decompose.py is for: when this no longer fails, it can go."""
    monkeypatch.setattr(stage, "allow_decomposing", lambda *_: None)
    monkeypatch.setattr(stage, "verify", lambda *_: {})
    with pytest.raises(EngineError, match=r"did not build encoder.g2.attention.onnx: .*not supported by a dedicated kernel"):
        build(pair, dataclasses.replace(OPTIONS, variants=("g2.attention",)))


def test_a_build_stopped_between_the_two_goes_on(pair, monkeypatch):
    compile_, calls = stage.compile_plan, list[int]()

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise EngineError("no more")
        return compile_(*args)

    monkeypatch.setattr(stage, "compile_plan", failing)
    with pytest.raises(EngineError, match=r"no more \(log: .*decoder.g2.grouped.b2.s32.log\)"):
        build(pair, OPTIONS)
    with pytest.raises(EngineError, match=r"has no tensorrt-rtx engine of variant g2.grouped; make one: headpool build"):
        open_session(pair, "g2.grouped", backend="tensorrt-rtx", batch=2)
    assert [item.part for item in record.read(pair.path / "engines" / FOLDER)] == ["encoder"]
    assert [item.fresh for item in build(pair, OPTIONS)] == [False, True]


@pytest.mark.usefixtures("bare")
def test_without_a_gpu_every_command_says_so_in_one_line(half, tmp_path, capsys):
    build(Bundle.open(half), BuildOptions(targets=("sm89",), capacity=64, prefill=32))
    for command in (
        ["run", str(half), "--tokens", "5,6,7", "--max-new-tokens", "4"],
        ["profile", str(half), "--contexts", "16", "--out", str(tmp_path / "out.json")],
    ):
        assert _run([*command, "--backend", "tensorrt-rtx"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "TensorRT engines run on an NVIDIA GPU: " in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capacity": 0}, "capacity 0 is not a whole number from 1 to"),
        ({"quantize": "int8"}, "variant g2.grouped is fp32; quantised weights need fp16 or bf16 beside them"),
        ({"targets": ("sm90",)}, "target 'sm90' is not one of sm75"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(pair, changes, words):
    with pytest.raises(EngineError, match=words):
        build(pair, dataclasses.replace(OPTIONS, **changes))
    assert not (pair.path / "engines").exists()


def test_an_input_may_be_longer_than_the_cache(half):
    encoder, decoder = (
        item.record for item in build(Bundle.open(half), BuildOptions(targets=("sm89",), capacity=16, prefill=40))
    )
    assert [dataclasses.astuple(profile) for profile in encoder.profiles] == [("input", 1, 40, 40)]
    assert decoder.recipe.capacity == 16
    cross = next(b for b in decoder.bindings if b.name == "past_key_values.0.encoder.key")
    assert cross.shape[2] == -1


def test_bf16_is_refused_for_a_chip_without_it(half):
    with pytest.raises(EngineError, match=r"variant g2 is bf16, and sm75 lacks bf16; leave sm75 out$"):
        build(Bundle.open(half), BuildOptions(targets=("sm75", "sm89"), capacity=32))


def test_heads_that_no_kernel_takes_are_refused(half):
    bundle = Bundle.open(half)
    (variant,) = bundle.variants
    small = dataclasses.replace(variant, config=dataclasses.replace(variant.config, head_dim=8))
    with pytest.raises(BundleError, match=r"variant g2 has heads of 8 channels; .*--pattern grouped"):
        build(Bundle(half, (small,)), dataclasses.replace(OPTIONS, variants=None))
