"""The conversion benchmark in a tiny form: shuffled heads are the same model, and come back without loss."""

from __future__ import annotations

import json

import numpy as np
import pytest

from exporter.checkpoint import open_source
from profiles.benchmarks import conversion

CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
          "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip


def test_shuffled_heads_come_back_where_groups_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "WINDOW", 32)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = open_source(tmp_path / "config.json", 0)
    tokens = np.random.default_rng(0).integers(0, 64, 63)
    original = conversion.loss(checkpoint, tokens)
    dealt = conversion.shuffled(checkpoint, 6)
    name = "model.layers.1.self_attn.k_proj.weight"
    heads = dealt.weights[name].read().reshape(3, 2, -1)
    assert not all(bool((pair[0] == pair[1]).all()) for pair in heads)  # neighbours are not copies of one head
    assert conversion.loss(dealt, tokens) == pytest.approx(original, abs=1e-5)
    rows = {
        grouping: conversion.measure(dealt, 2, tokens, original, method="optimal", grouping=grouping, calibration="none")
        for grouping in ("contiguous", "best")
    }
    assert abs(rows["best"]["added"]) < conversion.LOSSLESS
    assert abs(rows["contiguous"]["added"]) > 10 * conversion.LOSSLESS
    assert rows["best"].items() >= {"from": 6, "to": 2, "method": "optimal", "grouping": "best", "calibration": "none"}.items()
