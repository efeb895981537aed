"""The uptraining benchmark in a tiny form."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from profiles.benchmarks import uptraining

TINY = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 32}


def test_the_uptraining_benchmark(tmp_path, monkeypatch, capsys):
    words = np.random.default_rng(0).choice(["def", "class", "return", "import", "self", "="], (60, 80))
    for name, value in {
        "documents": lambda: [" ".join(line) + "\n" for line in words.tolist()],
        "MODEL": {**uptraining.MODEL, **TINY},
        "VOCABULARY": 280,
        "WINDOW": 16,
        "HELD_OUT": 4,
        "BATCH": 2,
        "ALPHAS": (0.05, 0.5),
        "PROMISE": "tiny",
    }.items():
        monkeypatch.setattr(uptraining, name, value)
    monkeypatch.setattr(sys, "argv", ["uptraining", str(tmp_path / "out.json"), str(tmp_path / "models"), "8"])
    uptraining.main()
    record = json.loads((tmp_path / "out.json").read_text())
    mha, *converted = record["rows"]
    assert [(row["method"], row["kv_heads"], row["alpha"], row["steps"]) for row in converted] == [
        (method, 8 if method == "none" else 2, alpha, steps)
        for method in uptraining.METHODS
        for alpha, steps in ((0.0, 0), (0.05, 1), (0.5, 4))
    ]
    assert (mha["steps"], mha["tokens"], mha["curve"][-1]) == (8, 8 * 2 * 16, [8, mha["nats_per_token"]])
    assert converted[0]["nats_per_token"] == pytest.approx(mha["nats_per_token"], abs=1e-5)  # α = 0 of the model itself
    for row in converted:
        assert row["ratio"] == pytest.approx(row["nats_per_token"] / mha["nats_per_token"])
    best = min(row["ratio"] for row in converted if row["kv_heads"] == 2 and row["alpha"] == 0.05)
    assert record["kept"] == (best <= uptraining.WITHIN)
    assert f"kept: {record['kept']} ({best:.4f}; tiny)" in capsys.readouterr().out
    monkeypatch.setattr(uptraining, "uptrain", lambda *_: pytest.fail("it was trained already"))
    (tmp_path / "out.json").unlink()
    uptraining.main()  # as after a stop: from what is there
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == record["rows"]
