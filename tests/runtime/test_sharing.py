"""Weights are in memory once: what a process holds before and after a second session, and a second model of the same bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from building import run

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.export import ExportOptions, export

MODEL = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module", params=["static", "concat"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(MODEL))
    patterns = (("fused",) if request.param == "static" else ()) + ("grouped", "gqa", "attention", "repeat")
    return export(open_source(folder / "config.json"), folder / "bundle", ExportOptions(patterns=patterns, cache=request.param))


def test_sessions_share_weights(bundle: Bundle, built: Path) -> None:
    """And models in pattern fused: other patterns' weights ONNX Runtime copies for each into layouts of its own."""
    for variant in bundle.variants:
        weights = (bundle.path / variant.weights[0]).stat().st_size
        words = (Path(__file__).with_name("held.py"), built / "src/libheadpool.so", bundle.path, variant.name)
        held = json.loads(run(sys.executable, *words))
        assert held["a session"] - held["nothing"] > 0.9 * weights, variant.name  # else this measures nothing
        assert held["another session"] - held["a session"] < 0.1 * weights, variant.name
        if variant.pattern == "fused":
            assert held["another model"] - held["another session"] < 0.1 * weights
