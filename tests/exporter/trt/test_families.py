"""Every family's graphs, as TensorRT parses them, are as planned: what it has on the way to its caches is not refused."""

from __future__ import annotations

import dataclasses

import hf
import pytest
import tiny

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.config import RopeConfig
from exporter.engines.tensorrt.api import Api, Messages
from exporter.engines.tensorrt.build import prepare
from exporter.engines.tensorrt.parts import parts_of, unfit
from exporter.engines.tensorrt.plan import BuildOptions, recipe_of
from exporter.export import ExportOptions, export

TARGETS = ("sm89",)
FAMILIES = (
    *("llama", "llama-tied-biased", "llama-glu-llama3", "llama-bilinear-linear", "llama-mqa-relu-yarn"),
    *("mistral", "qwen2", "qwen3", "gemma", "phi3-partial", "starcoder2"),
)


def verified(api: Api, bundle: Bundle, quantize: str | None = None) -> list[str]:
    """The patterns whose networks are as planned. Raises GraphError."""
    patterns = []
    for variant in bundle.variants:
        if unfit(variant) is None:
            (part,) = parts_of(variant)
            recipe = recipe_of(bundle, part, api, TARGETS, BuildOptions(targets=TARGETS, batch=2, prefill=8, quantize=quantize))
            prepare(bundle, part, recipe, api, Messages())
            patterns.append(variant.pattern)
    return patterns


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_planned(name, dtype, api, tmp_path):
    options = ExportOptions(patterns=("attention", "grouped"), dtype=dtype, logits="last" if dtype == "fp16" else "all")
    bundle = export(open_checkpoint(hf.save(name, tmp_path)), tmp_path / "bundle", options)
    assert verified(api, bundle)[-1] == "grouped"


MADE_UP = {
    "qk-norm and biases": {"qk_norm": True, "qkv_bias": True},
    "qk-norm of 1 and a weight": {"qk_norm": True, "norm_offset": True},
    "gated values": {"glu_value_dim": 8},
    "gated values with biases": {"glu_value_dim": 8, "qkv_bias": True},
    "no positions": {"rope": RopeConfig("none")},
    "half of each head rotated": {"rope": RopeConfig(theta=100.0, fraction=0.5)},
}


@pytest.mark.parametrize("pattern", ["attention", "grouped"])
@pytest.mark.parametrize("what", MADE_UP)
def test_what_a_head_may_have_is_as_planned(what, pattern, api, tmp_path):
    model = tiny.decoder(dataclasses.replace(tiny.CONFIG, **MADE_UP[what]))
    assert verified(api, tiny.bundle(tmp_path, model, pattern, dtype="fp16")) == [pattern]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_weights_are_as_planned(kind, api, tmp_path):
    model = tiny.decoder(dataclasses.replace(tiny.CONFIG, hidden_size=96, intermediate_size=64, qkv_bias=True, qk_norm=True))
    for pattern in ("attention", "grouped"):
        assert verified(api, tiny.bundle(tmp_path, model, pattern, dtype="fp16"), kind) == [pattern]
