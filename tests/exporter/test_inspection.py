"""What inspect says of checkpoints and bundles, and that no line about a bundle is true of only some of its graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from exporter.bundle import Bundle
from exporter.checkpoint import Checkpoint
from exporter.export import ExportOptions, export
from exporter.inspection import bundle_report, inspect, kv_heads_text, render
from exporter.units import size

# The tiny llama: embedding and head 67·48 each, a layer's Q and O 48·48 each, FFN 3·48·40, norms 2·48 a layer and 48.
BESIDES_KV = 2 * 67 * 48 + 2 * (2 * 48 * 48 + 3 * 48 * 40 + 2 * 48) + 48
ARCHITECTURE = [
    "  llama: 2 layers, d 48, 6 query heads of 8",
    "  FFN swiglu 40, norm rms",
    "  RoPE default, θ 10000",
    "  vocabulary 67, context 128 tokens",
]


def parameters(kv_heads: int) -> int:
    return BESIDES_KV + 2 * 2 * 48 * 8 * kv_heads


def test_a_checkpoint(saved: Path) -> None:
    assert render(inspect(saved)) == [
        f"{saved}: checkpoint, float32",
        f"  {parameters(2):,} parameters ({2 * 67 * 48:,} in embeddings)",
        "  2 KV heads a layer",
        *ARCHITECTURE,
        "  KV cache a token: 256 B in fp32, 128 B in fp16, 128 B in bf16, 96 B in int8",
    ]
    assert render(inspect(saved / "config.json"))[0] == f"{saved}/config.json: config, float32"


def test_the_head_of_a_bundle_is_true_of_all_its_graphs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(groups=(6, 1)))
    head, *lines = render(inspect(tmp_path / "out"))
    assert head == f"{tmp_path}/out: bundle of llama, 2 graphs"
    assert lines == [
        *ARCHITECTURE,
        "  model.g6.onnx: 6 KV heads a layer, grouped, static cache, fp32",
        f"    {parameters(6):,} parameters; a token reads {size(4 * (parameters(6) - 67 * 48))} of weights "
        "and takes 768 B of KV cache",
        "  model.g1.onnx: 1 KV head a layer, grouped, static cache, fp32",
        f"    {parameters(1):,} parameters; a token reads {size(4 * (parameters(1) - 67 * 48))} of weights "
        "and takes 128 B of KV cache",
    ]
    other = dataclasses.replace(bundle.variants[1], config=dataclasses.replace(bundle.variants[1].config, max_positions=64))
    lines = render(bundle_report(Bundle(bundle.path, (bundle.variants[0], other))))
    assert lines[1:4] == ARCHITECTURE[:3]  # and each graph has its own fourth
    assert lines[6] == f"  {ARCHITECTURE[3]}"
    assert lines[9] == "    vocabulary 67, context 64 tokens"


@pytest.mark.parametrize(
    ("kv_heads", "text"),
    [
        ([4, 4], "4 KV heads a layer"),
        ([1, 1, 1], "1 KV head a layer"),
        ([3, 3, 1, 1, 1, 2], "3 in layers 0-1, 1 in layers 2-4, 2 in layer 5"),
    ],
)
def test_kv_heads_in_words(kv_heads: list[int], text: str) -> None:
    assert kv_heads_text(kv_heads) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1024, "1.02 kB"), (46_080, "46.1 kB"), (999_499, "999 kB")),
        *((999_600, "1 MB"), (538_000_000, "538 MB"), (16.06e9, "16.1 GB"), (2e12, "2 TB")),
    ],
)
def test_bytes_in_decimal_units(count: float, text: str) -> None:
    assert size(count) == text
