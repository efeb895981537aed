"""The conversion benchmark in a tiny form: shuffled heads come back without loss; a run goes on; promises are judged."""

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


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Out of time it measures nothing more; run again, only what is missing."""
    monkeypatch.setattr(conversion, "WINDOW", 32)
    monkeypatch.setattr(conversion, "METHODS", ("mean", "first"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokens = np.random.default_rng(0).integers(0, 64, 63)
    study = conversion.Study("tiny", open_source(tmp_path / "config.json", 0), (1,), tokens, tmp_path / "text")
    path = tmp_path / "rows"
    conversion.run(study, conversion.Rows(path), until=0.0)
    assert [row["method"] for row in conversion.Rows(path).rows] == [None]
    conversion.run(study, conversion.Rows(path), until=float("inf"))
    rows = conversion.Rows(path).rows
    assert [row["method"] for row in rows] == [None, "mean", "first"]
    conversion.run(study, conversion.Rows(path), until=float("inf"))
    assert conversion.Rows(path).rows == rows
    assert rows[1]["added"] == pytest.approx(rows[1]["nats_per_token"] - rows[0]["nats_per_token"])


def test_the_promise_is_judged_by_the_best_method():
    def rows(share: float) -> list[dict]:
        made = []
        for study, groups in (("smollm2", 1), ("small", 4), ("small", 2), ("small", 1)):
            made.append({"study": study, "to": groups + 1, "method": None, "added": 0.0})
            added = {"mean": 2.0, "random": 3.0, "first": 2.5}
            made += [{"study": study, "to": groups, "method": name, "added": value} for name, value in added.items()]
            for calibration in conversion.LIMITS:
                for method, value in (("optimal", 2 * share), ("procrustes", 1.9)):
                    row = {"study": study, "to": groups, "method": method, "calibration": calibration, "added": value}
                    made.append(row)
        return made

    kept, best = conversion.judge(rows(0.09))
    assert kept
    assert set(best.values()) == {0.09}
    assert not conversion.judge(rows(0.11))[0]  # above 0.10 with text
    worse = rows(0.09)
    next(row for row in worse if (row["study"], row["to"], row["method"]) == ("small", 4, "first"))["added"] = 1.0
    assert not conversion.judge(worse)[0]
