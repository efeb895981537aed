"""The benchmarks run in a tiny form; what they promise of the real one is not tested, but measured."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.decode import decode
from exporter.engines import open_session
from exporter.engines.torch_eager import open_torch
from exporter.errors import EngineError, UserError
from exporter.evaluate import cross_entropy, default_text
from exporter.export import ExportOptions, export
from exporter.tokenizer import Tokenizer
from profiles.benchmarks import decoder, glu_training, kv_cache, papers, quantised, rounding, t5_decoding, text
from profiles.benchmarks.logits import PATHS, STEPS, differences, transformers_logits
from profiles.reading import READ
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
    steps = [cell for cell in run.cells if cell.subject.pattern != READ]
    reads = {(cell.subject.groups, cell.context): np.median(cell.samples) for cell in run.cells if cell not in steps}
    assert [(row["groups"], row["pattern"], row["context"]) for row in record["rows"]] == [
        (g, pattern, context) for context in (8, 24) for g in (4, 1) for pattern in ("grouped", "repeat")
    ]
    for row, cell in zip(record["rows"], steps, strict=True):
        p50, size = float(np.median(cell.samples)), cell.subject.weight_bytes + cell.kv_bytes
        assert row["p50_ms"] == pytest.approx(p50 * 1e3)
        assert row["ratio"] == pytest.approx(p50 / reads[row["groups"], row["context"]])
        assert row["ratio_at_best_bandwidth"] == pytest.approx(p50 * max(run.bandwidth.samples) / size)
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


def test_the_t5_benchmark(tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "out.json"
    small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 12, "vocab_size": 64}
    config.write_text(json.dumps({**json.loads(t5_decoding.CONFIG.read_text()), **small}))
    t5_decoding.main(out, config=config, groups=(12, 2, 1), source=40, target=37)
    record = json.loads(out.read_text())
    assert [row["groups"] for row in record["rows"]] == [12, 2, 1]
    for row in record["rows"]:
        assert row["attention_gain"] == pytest.approx(record["rows"][0]["attention_ms"] / row["attention_ms"])
        assert row["sample_s"] > row["first_token_s"] + 36 * 0.2e-3 * row["step_ms"]
        assert row["least_gain"] is None  # it is for 8 KV heads and more


def test_the_glu_benchmark_goes_on(tmp_path, monkeypatch):
    """Two models and seeds, stopped once: what was trained is not trained again, and means and spreads are of the seeds."""
    out = tmp_path / "out.json"
    chosen = [found for found in glu_training.models() if found[0]["ffn"] == "swiglu"]
    assert [config.glu_value_dim for _, config in chosen] == [None, 32]
    trained = []

    def train(config, folder, data, steps, seed):
        trained.append((config.glu_value_dim, seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"nats_per_token": 3 + seed / 4 + (config.glu_value_dim or 0) / 64}

    monkeypatch.setattr(glu_training, "models", lambda: iter(chosen))
    monkeypatch.setattr(glu_training, "SEEDS", (0, 1))
    monkeypatch.setattr(glu_training, "train", train)
    monkeypatch.setattr(glu_training, "documents", lambda: [])
    monkeypatch.setattr(glu_training, "write_data", lambda folder, texts: {"held": "", "train": ""})
    monkeypatch.setattr("sys.argv", ["glu_training", str(out)])
    with pytest.raises(KeyboardInterrupt):
        glu_training.main()
    glu_training.main()
    assert trained == [(None, 0), (32, 0), (None, 1), (None, 1), (32, 1)]
    found = json.loads(out.read_text())["settings"]["summary"]
    assert [(row["attention"], row["nats_per_token"]) for row in found] == [("plain", 3.125), ("glu", 3.625)]
    assert found[0]["spread"] == pytest.approx(np.std([3, 3.25], ddof=1))


@pytest.mark.parametrize("key", [0, 3, 8])  # plain FFN, gated FFN, GLU attention
def test_its_models_have_equal_parameters(key):
    from exporter.checkpoint import expected_shapes

    counts = [sum(math.prod(shape) for shape in expected_shapes(config).values()) for _, config in glu_training.models()]
    assert counts[key] == counts[0]


def test_the_papers_page():
    """Its words are those of the rows."""
    t5_rows = [
        {"groups": g, "pattern": "fused", "sample_s": 10 + g, "first_token_s": 9.0, "step_ms": 2.0, "attention_ms": 0.5 * g,
         "attention_gain": 64 / g, "kept": g != 8, "paper_s": t5_decoding.PAPER.get(g)}
        for g in (64, 8, 1)
    ]  # fmt: skip
    rows = [
        {**key, "seed": seed, "nats_per_token": 3 + (glu_training.PAPER[key["ffn"]] - 2) / 10 + 0.01 * seed - 0.1 * glu,
         "curve": [[0, 8.0], [1, 3.5], [2, 3.0 - 0.1 * glu]]}
        for key, _ in glu_training.models()
        for glu in [key["attention"] == "glu"]
        for seed in (0, 1)
    ]  # fmt: skip
    machine = {"cpu": "a <CPU>", "cores": 2}
    page = papers.render(
        {"rows": t5_rows, "machine": machine, "created": "2026-01-02T03:04"},
        {
            "rows": rows,
            "settings": {"steps": 2, "summary": glu_training.summary(rows)},
            "machine": {"cpu": "another", "cores": 4},
            "created": "2026-05-06T07:08",
        },
    )
    assert "T5: a &lt;CPU&gt;, 2 cores · 2026-01-02; GLU: another, 4 cores · 2026-05-06" in page
    assert "is missed with 8 KV heads." in page
    assert "takes 0.15 × the time here" in page
    assert "rank correlation with the paper&#39;s order is 1.00" in page
    assert "after 2 steps the lower one with 2 of 2 seeds" in page


@pytest.mark.usefixtures("small_probe")
def test_the_quantised_benchmark(tmp_path, monkeypatch):
    import hf

    from exporter.convert import calibration

    monkeypatch.setattr(calibration, "WINDOW", 64)

    folder, out = tmp_path / "model", tmp_path / "out.json"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf.build("llama", sizes).save_pretrained(folder)
    hf.add_tokenizer(folder)
    plan = {"samples": 8, "burst": 2, "warmup": 0, "settle": 0}
    quantised.main(out, folder, folder / "config.json", (4, 1), (8, 24), (4, 40), **plan)
    record = json.loads(out.read_text())
    steps = [row for row in record["rows"] if row["what"] == "step"]
    assert {(row["weights"], row["groups"], row["context"]) for row in steps} == {
        (kind, g, context) for kind in ("fp32", "int8", "int4") for g in (4, 1) for context in (8, 24)
    }
    assert not record["kept"]  # there is no context of 4,096
    assert len(record["run"]["cells"]) == 24
    losses = {(row["weights"], row["rounded"]): row for row in record["rows"] if row["what"] == "loss"}
    assert len(losses) == 1 + 1 + 2 * 4
    exact, eight, four = (losses[kind, "to the nearest"] for kind in ("fp32", "int8", "int4"))
    assert exact["added"] == exact["error"] == 0
    assert 0 < abs(eight["added"]) < abs(four["added"])
    assert exact["weight_bytes"] > eight["weight_bytes"] > four["weight_bytes"] > losses["int4-128", "by GPTQ"]["weight_bytes"]
    assert losses["int4", "by GPTQ"]["nats_per_token"] != four["nats_per_token"]
    checkpoint = open_checkpoint(folder)
    tokens = Tokenizer.from_files(checkpoint.side_files, "model").encode(default_text()[:2000], special=False)[:161]
    with open_torch(checkpoint, capacity=40) as session:
        ours = [cross_entropy(session, tokens[start : start + 41], 41, 40).nats_per_token for start in range(0, 160, 40)]
    assert exact["nats_per_token"] == pytest.approx(np.mean(ours), abs=1e-4)


def test_what_the_quantised_benchmark_promises():
    fast = [{"what": "step", "weights": "int4", "groups": g, "context": 4096, "times": 1.6} for g in (16, 4, 1)]
    losses = rounding.summary(
        [
            {"what": "loss", "weights": weights, "rounded": how, "pieces": [2.0 + added, 4.0 + added]}
            for weights, how, added in (
                ("fp32", "to the nearest", 0.0),
                ("int4", "to the nearest", 0.30),
                ("int4", "by GPTQ", 0.19),
                ("int4-128", "to the nearest", 0.30),
                ("int4-128", "by GPTQ", 0.19),
            )
        ]
    )
    assert [round(row["added"], 6) for row in losses] == [0, 0.3, 0.19, 0.3, 0.19]
    assert quantised.is_kept(fast + losses)
    assert not quantised.is_kept([*fast[:2], {**fast[2], "times": 1.4}, *losses])
    assert not quantised.is_kept([{**fast[0], "times": 0.9}, *fast[1:], *losses])
    assert not quantised.is_kept([*fast, *losses[:4], {**losses[4], "added": 0.21}])
    noisy = {**losses[4], "pieces": [2.0, 4.38]}  # as little on average, but not beyond what it varies by
    assert not quantised.is_kept([*fast, *losses[:4], noisy])


@pytest.mark.usefixtures("small_probe")
def test_the_kv_cache_benchmark(tmp_path, capsys):
    import hf

    folder, out = tmp_path / "model", tmp_path / "out.json"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf.build("llama", sizes).save_pretrained(folder)
    hf.add_tokenizer(folder)
    plan = {"samples": 8, "burst": 2, "warmup": 0, "settle": 0}
    kv_cache.main(out, folder, folder / "config.json", (4, 1), (8, 24), 300, **plan)
    record = json.loads(out.read_text())
    steps = {
        (row["weights"], row["cache"], row["groups"], row["context"]): row for row in record["rows"] if row["what"] == "step"
    }
    kinds = [(weights, cache) for weights in ("fp32", "int4") for cache in ("fp32", "fp16", "int8")]
    assert set(steps) == {(*kind, g, context) for kind in kinds for g in (4, 1) for context in (8, 24)}
    for (weights, cache, g, context), row in steps.items():
        assert row["kv_bytes_per_token"] == 2 * g * 2 * {"fp32": 64, "fp16": 32, "int8": 20}[cache]
        assert row["times"] == pytest.approx(steps[weights, "fp32", g, context]["p50_ms"] / row["p50_ms"])
    assert {cell["cohort"] for cell in record["run"]["cells"]} == {0}
    assert record["settings"]["tokens"] == 300
    loss = {row["cache"]: row["nats_per_token"] for row in record["rows"] if row["what"] == "loss"}
    assert 0 < abs(loss["fp16"] - loss["fp32"]) < abs(loss["int8"] - loss["fp32"])
    assert not record["kept"]  # there is no context of 4,096
    assert f"kept: {record['kept']}" in capsys.readouterr().out

    far = [{"what": "step", "cache": cache, "context": 4096, "times": 1.2} for cache in ("fp32", "int8")]
    lost = [{"what": "loss", "cache": cache, "nats_per_token": loss} for cache, loss in (("fp32", 2), ("int8", 2.005))]
    assert kv_cache.is_kept([*far, *lost])
    assert not kv_cache.is_kept([far[0], {**far[1], "times": 0.99}, *lost])
    assert not kv_cache.is_kept([*far, lost[0], {**lost[1], "nats_per_token": 2.02}])


def test_the_text_benchmark(tmp_path, monkeypatch, capsys):
    """headpool's side as it is; llama.cpp's, whose environment is not here, with times that are told."""
    import hf

    folder, out = tmp_path / "model", tmp_path / "out.json"
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": None,
    }
    hf.build("llama", sizes).save_pretrained(folder)
    hf.add_tokenizer(folder)
    asked = []

    def other(model, threads, flash, count, prompt):
        asked.append((model, threads, flash))
        return report(len(prompt), [0] * count, 20.0 if flash else 10.0)  # its tokenizer has a sign a token

    monkeypatch.setattr(text, "quantised", lambda source, folder, threads: (source, 1234))
    monkeypatch.setattr(text, "in_llama_cpp", other)
    text.main(out, folder, (9, 30), count=3, turns=2, threads=1)
    record = json.loads(out.read_text())
    assert record["kept"]  # a tiny model's token takes less than ten seconds
    assert asked == [(folder, 1, flash) for flash in (0, 1, 1, 0)] * 2
    assert record["settings"]["weight_bytes"]["llama.cpp"] == 1234
    assert record["settings"]["weight_bytes"]["headpool"] > 1234
    for row in record["rows"]:
        assert row["beside"] == "llama.cpp"
        assert len(row["ms"]["headpool"]) == 2
        assert row["tokens_per_second"]["llama.cpp"] == pytest.approx(0.1)
        assert row["times"] == pytest.approx(np.median([1e4 / ms for ms in row["ms"]["headpool"]]))
        assert set(row["texts"]) == {"headpool", "llama.cpp", "llama.cpp, flash attention"}
    assert "tokens/s: headpool" in capsys.readouterr().out


def report(length, tokens, seconds):
    return {"prompt_tokens": [length], "tokens": [tokens], "texts": ["…"], "time_to_first_token_seconds": 1.0,
            "seconds_per_token_p50": seconds}  # fmt: skip


def test_text_is_compared_turn_by_turn():
    """A machine that gets slower from turn to turn changes no ratio; what does other work is no comparison."""
    turns = dict.fromkeys((text.OWN, *text.OTHERS), 0)

    def way(name, seconds, tokens=4):
        def run(prompt):
            turns[name] += 1
            return report(7, [0] * tokens, seconds * 2 ** turns[name])

        return run

    ways = {"headpool": way("headpool", 1.0), "llama.cpp": way("llama.cpp", 3.0)}
    row = text.in_turns(ways | {"llama.cpp, flash attention": way("llama.cpp, flash attention", 1.5)}, "text", 4, 6)
    assert (row["beside"], row["times"], row["low"], row["high"]) == ("llama.cpp, flash attention", 1.5, 1.5, 1.5)
    assert row["ms"]["headpool"] == [2000.0 * 2**turn for turn in range(6)]
    with pytest.raises(EngineError, match=r"not all read 7 tokens and made 4, \(read, made\) are .*3\)"):
        text.in_turns(ways | {"llama.cpp": way("llama.cpp", 3.0, tokens=3)}, "text", 4, 2)
