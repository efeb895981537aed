"""What cannot become an engine is refused before anything is built, in one line that says what to do."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from exporter.bundle import Bundle
from exporter.engines import open_session
from exporter.engines.tensorrt import plan as planning
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.parts import parts_of
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.errors import BundleError, EngineError

OPTIONS = BuildOptions(targets=("sm86", "sm89"), batch=2, capacity=32, prefill=8)

REFUSALS = [
    ({"capacity": 401}, "capacity 401 is not a whole number from 1 to 400, the model's context"),
    ({"prefill": 33}, "prefill 33 is not a whole number from 1 to 32, the capacity"),
    ({"batch": 0}, "batch 0 is not a whole number from 1 to 65536"),
    ({"optimisation": 6}, "optimisation level 6 is not a whole number from 0 to 5"),
    ({"workspace": 0}, "workspace 0 MiB is not a whole number from 1"),
    ({"targets": ("sm90",)}, "target 'sm90' is not one of sm75, sm80, sm86, sm89, sm120, sm121, here"),
    ({"targets": ("sm89", "sm89")}, "targets sm89, sm89: name each once, and here alone"),
    ({"targets": ("here", "sm89")}, "targets here, sm89: name each once, and here alone"),
    ({"targets": ("here",)}, "TensorRT engines run on an NVIDIA GPU: "),
    ({"backend": "tensorrt"}, "backend tensorrt needs tensorrt, which is not installed: pip install"),
    ({"backend": "openvino"}, "backend 'openvino' is not one of tensorrt, tensorrt-rtx"),
    ({"compatible": ("version",)}, "--compatible is of backend tensorrt"),
    (
        {"strip": True},
        "builds an engine without weights on the GPU it is for; leave --strip out, or build there with --target here",
    ),
    ({"quantize": "fp8"}, "sm86 lacks fp8, which starts with sm89; leave out of --target"),
    ({"variants": ("x",)}, "variant 'x' is not one of v"),
]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("changes", "words"), REFUSALS, ids=[str(changes) for changes, _ in REFUSALS])
def test_what_cannot_be_is_refused_before_anything_is_built(attention, changes, words):
    with pytest.raises((EngineError, BundleError)) as caught:
        build(attention, dataclasses.replace(OPTIONS, **changes))
    assert words in str(caught.value)
    assert not (attention.path / "engines").exists()


def test_a_gpu_that_the_library_does_not_name_is_left_to_its_builder(attention, monkeypatch):
    """sm90 has no name in TensorRT for RTX; where it is the GPU here, the builder is asked for "the current one"."""
    monkeypatch.setattr("exporter.engines.tensorrt.device.compute_capability", lambda: "sm90")
    with pytest.raises(EngineError, match=r"did not build|takes no profile"):
        build(attention, dataclasses.replace(OPTIONS, targets=("here",)))
    assert not list(attention.path.rglob("*.engine"))


def test_bf16_is_refused_for_a_chip_without_it(decoder, tmp_path):
    bundle = tiny.bundle(tmp_path, decoder, "attention", dtype="bf16")
    with pytest.raises(EngineError, match=r"variant v is bf16, and sm75 lacks bf16; leave sm75 out, or export it in fp16"):
        build(bundle, dataclasses.replace(OPTIONS, targets=("sm75", "sm89")))


@pytest.mark.parametrize(("pattern", "dtype"), [("attention", "fp32"), ("grouped", "fp16")])
def test_what_need_not_be_fused_has_any_number_of_rows(decoder, tmp_path, pattern, dtype):
    (part,) = parts_of(tiny.bundle(tmp_path, decoder, pattern, dtype=dtype).variants[0])
    planning._check_rows(part, {"capacity": 2**20, "prefill": 2**20})


def test_more_rows_than_a_fused_kernel_takes_are_refused(attention):
    """TensorRT itself says so after it has begun, in two lines that name no number."""
    (part,) = parts_of(attention.variants[0])
    planning._check_rows(part, {"capacity": 24_560, "prefill": 24_560})
    with pytest.raises(
        EngineError, match=r"capacity 24561: TensorRT has no fused kernel .* more than 24560 rows in fp16; lower"
    ):
        planning._check_rows(part, {"capacity": 24_561, "prefill": 1})


def test_an_input_longer_than_a_fused_kernel_takes_is_refused(pair):
    """A T5's, in fp32: the encoder's attention may be taken apart there, cross-attention may not."""
    encoder, decoder = parts_of(pair.variant("g2.attention"))
    planning._check_rows(encoder, {"capacity": 2**20, "prefill": 2**20})
    planning._check_rows(decoder, {"capacity": 12_272, "prefill": 12_272})
    for sizes in ({"capacity": 12_273, "prefill": 1}, {"capacity": 1, "prefill": 12_273}):
        with pytest.raises(EngineError, match=r"12273: TensorRT has no fused kernel .* more than 12272 rows in fp32; lower --"):
            planning._check_rows(decoder, sizes)


def test_fp32_is_refused_for_a_chip_without_its_products(decoder, tmp_path):
    with pytest.raises(EngineError, match=r"variant v is fp32, and sm75 lacks products of fp32; leave sm75 out, or export"):
        build(tiny.bundle(tmp_path, decoder, "grouped"), dataclasses.replace(OPTIONS, targets=("sm75", "sm89")))
    assert not (tmp_path / "engines").exists()


def test_what_cannot_become_an_engine_costs_the_others_nothing(attention, decoder):
    """Without --variant; by name it is refused."""
    other = tiny.bundle(attention.path, decoder, "gqa", dtype="fp16").variants[0]
    both = Bundle(attention.path, (dataclasses.replace(other, name="w"), *attention.variants))
    assert [item.record.variant for item in build(both, OPTIONS)] == ["v"]
    with pytest.raises(BundleError, match=r"variant w \(gqa, static cache\) cannot become an engine"):
        build(both, dataclasses.replace(OPTIONS, variants=("v", "w")))
    with pytest.raises(EngineError, match=r"variant w \(gqa, static cache\) cannot become an engine"):
        open_session(both, "w", backend="tensorrt-rtx")


def test_heads_that_no_kernel_takes_are_refused(tmp_path, attention):
    variant = attention.variants[0]
    small = dataclasses.replace(variant, config=dataclasses.replace(variant.config, head_dim=12))
    with pytest.raises(BundleError, match=r"heads of 12 channels; .*--pattern grouped"):
        build(Bundle(attention.path, (small,)), OPTIONS)


@pytest.mark.parametrize(("pattern", "cache"), [("gqa", "static"), ("attention", "concat"), ("repeat", "concat")])
def test_a_bundle_without_a_static_cache_graph_is_refused(decoder, tmp_path, pattern, cache):
    bundle = tiny.bundle(tmp_path, decoder, pattern, cache=cache)
    with pytest.raises(BundleError, match=rf"v \({pattern}, {cache} cache\) cannot become an engine; .*--pattern attention"):
        build(bundle, OPTIONS)
