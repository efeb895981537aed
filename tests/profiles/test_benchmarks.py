"""The benchmarks run in a tiny form; what they promise of the real one is not tested, but measured."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.decode import decode
from exporter.engines import open_session
from exporter.errors import UserError
from exporter.export import ExportOptions, export
from profiles.benchmarks import decoder
from profiles.benchmarks.logits import PATHS, STEPS, differences, transformers_logits
from profiles.results import Results

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize(("most", "kept"), [(1e9, True), (1e-9, False)])
def test_the_decoder_benchmark(tmp_path, capsys, most, kept):
    config, out = tmp_path / "config.json", tmp_path / "out.json"
    config.write_text(json.dumps({**json.loads(decoder.CONFIG.read_text()), **TINY, "head_dim": 8}))
    decoder.main(out, config, (4, 1), ("grouped", "repeat"), {8: most, 24: 1e9}, samples=4, burst=2, warmup=0, settle=0)
    record = json.loads(out.read_text())
    run = decode(Results, record["run"], "run")
    assert (record["kept"], record["versions"]) == (kept, run.versions)
    assert "8 tokens and 1e+09 × the floor at 24 tokens, for every G" in record["promise"]
    assert [(row["groups"], row["pattern"], row["context"]) for row in record["rows"]] == [
        (g, pattern, context) for context in (8, 24) for g in (4, 1) for pattern in ("grouped", "repeat")
    ]
    for row, cell in zip(record["rows"], run.cells, strict=True):
        p50, size = float(np.median(cell.samples)), cell.subject.weight_bytes + cell.kv_bytes
        assert row["p50_ms"] == pytest.approx(p50 * 1e3)
        assert row["ratio"] == pytest.approx(p50 * max(run.bandwidth.samples) / size)
        assert row["ratio_at_median_bandwidth"] == pytest.approx(p50 * np.median(run.bandwidth.samples) / size)
        assert row["kept"] == (row["ratio"] <= row["limit"])
    assert f"kept: {kept}" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists; choose another name"):
        decoder.main(out, config)


def test_only_the_first_pattern_is_promised(tmp_path, monkeypatch, factory):
    cells = tuple(
        factory.cell(factory.subject(g, p), samples=(over * 0.01,), floor=0.01)
        for g in (9, 1)
        for p, over in (("grouped", 1.1), ("repeat", 9))
    )
    monkeypatch.setattr(decoder, "measure", lambda *_: factory.sweep(cells=cells))
    for patterns, kept in ((("grouped", "repeat"), True), (("repeat", "grouped"), False)):
        out = tmp_path / f"{patterns[0]}.json"
        decoder.main(out, patterns=patterns, limits={1024: 1.2})
        assert json.loads(out.read_text())["kept"] == kept


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint that transformers made, its bundles in both cache forms, and texts with the reference's logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("logits")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).save_pretrained(folder / "hf")
    checkpoint = open_checkpoint(folder / "hf")
    made = {
        cache: export(checkpoint, folder / cache, ExportOptions(patterns=("gqa",), cache=cache))
        for cache in ("static", "concat")
    }
    texts = [np.random.default_rng(n).integers(0, 64, n + STEPS) for n in (31, 19, 8)]
    reference = transformers_logits(folder / "hf")
    return made, texts, [reference(text) for text in texts]


@pytest.mark.parametrize("cache", ["static", "concat"])
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_compared_along_every_path(tiny, cache, batch):
    made, texts, expected = tiny
    bundle = made[cache]
    capacity = max(map(len, texts))
    with open_session(bundle, bundle.variants[0].name, batch=batch, capacity=capacity) as session:
        compare = functools.partial(differences, session, texts[:batch])
        found = compare(expected[:batch])
        assert tuple(found) == PATHS
        assert max(found.values()) < 2e-4
        for row in range(batch):  # an error in any sequence is seen, and on its own path
            wrong = [rows.copy() for rows in expected[:batch]]
            wrong[row][-STEPS - 1, 5] += 1
            off = compare(wrong)
            assert off["prefill"] == pytest.approx(1, abs=1e-3)
            assert off["chunked prefill"] == pytest.approx(1, abs=1e-3)
            assert off["decode"] < 2e-4
            wrong = [rows.copy() for rows in expected[:batch]]
            wrong[row][-1, 5] = np.nan
            off = compare(wrong)
            assert off["prefill"] < 2e-4
            assert off["decode"] == np.inf
