from __future__ import annotations

import json

import pytest

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.errors import BundleError, UserError
from exporter.export import ExportOptions, export
from profiles import bundles
from profiles.measure import Plan
from profiles.report import render
from profiles.results import Results

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
pytestmark = pytest.mark.usefixtures("small_probe")
PLAN = Plan(contexts=(24, 90), batches=(1, 3), samples=4, burst=2, warmup=1, prefill_samples=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return export(
        open_source(folder / "config.json"), folder / "b", ExportOptions((4, 1), patterns=("grouped", "gqa", "repeat"))
    )


def test_every_variant_of_a_real_bundle(bundle, tmp_path):
    seen = []
    results = bundles.profile_bundle([bundle.path], PLAN, threads=1, breakdown=(90,), progress=lambda *step: seen.append(step))
    assert len(results.cells) == 6 * 2 * 2 * 3
    assert seen[-1][0] == seen[-1][1] == 6 * 2 * 2 * (4 + 2)
    for cell in results.cells:
        variant = bundle.variant(cell.subject.variant)
        assert cell.subject.kv_bytes_per_token == variant.kv_bytes_per_token
        assert (cell.backend, cell.options["threads"]) == ("onnxruntime", 1)
        decode = cell.kind == "decode"
        assert len(cell.samples) == (4 if decode else 2)
        assert (cell.floor is not None) == decode
        assert (cell.breakdown is not None) == (decode and cell.context == 90)
        if cell.breakdown:
            assert min(cell.breakdown["attention"], cell.breakdown["matmul"], cell.breakdown["other"]) > 0
    assert results.bandwidth.threads == results.arithmetic.threads == 1
    assert {cell.subject.attention_operations for cell in results.cells} == {
        4 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"]
    }
    assert len(results.bandwidth.samples) == 3 * (1 + 4 * 3 + 1)  # before, three times in each of four cohorts, after
    assert Results.load(results.save(tmp_path / "r.json")) == results
    assert "Where the time goes" in render([results])
    assert {path.name for path in tmp_path.iterdir()} == {"r.json"}


def test_chosen_variants_and_mistakes(bundle):
    plan = Plan(contexts=(8,), kinds=("decode",), samples=1)
    name = bundle.variants[1].name
    results = bundles.profile_bundle([bundle.path], plan, variants=[name], threads=1)
    assert [cell.subject.variant for cell in results.cells] == [name]
    with pytest.raises(BundleError, match=r"variant 'g9' is not one of g1"):
        bundles.profile_bundle([bundle.path], plan, variants=["g9"])
    with pytest.raises(UserError, match="breakdown context 9 is not one of 8"):
        bundles.profile_bundle([bundle.path], plan, breakdown=(9,))


def test_the_hash_is_of_what_was_measured(bundle):
    again = Bundle.open(bundle.path)
    hashes = [bundles.bundle_hash(bundle, variant) for variant in bundle.variants]
    assert hashes == [bundles.bundle_hash(again, variant) for variant in again.variants]
    assert len(set(hashes)) == len(hashes)
