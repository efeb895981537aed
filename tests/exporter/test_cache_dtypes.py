"""Bundles with caches of fp16 and int8: logits against transformers over a cache that rounds so, sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import hf
import numpy as np
import pytest
import torch

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.cli import _run
from exporter.engines import open_session
from exporter.engines.torch_eager import open_torch
from exporter.errors import BundleError, EngineError
from exporter.export import ExportOptions, export
from exporter.inspection import inspect
from exporter.models import cache_rows
from graphs.caches import CACHES

TOKENS = np.random.default_rng(3).integers(0, 67, size=(2, 60))
MODELS = ("llama", "llama-mqa-relu-yarn", "qwen3", "phi3-partial", "starcoder2")  # heads of 8 and 16 channels


def as_stored(x: torch.Tensor, cache: str | None) -> torch.Tensor:
    """What rows [..., D] become in such a cache."""
    if cache is None:
        return x
    if cache == "fp16":
        return x.half().float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def reference(name: str, cache: str | None, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Logits [B,T,V] of transformers' model, whose attention reads keys and values as such a cache holds them."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *given: Any, **named: Any) -> Any:
            return super().update(as_stored(key_states, cache), as_stored(value_states, cache), *given, **named)

    with torch.no_grad():
        return hf.model(name)(torch.from_numpy(tokens), past_key_values=Rounding(), use_cache=True).logits.numpy()


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: hf.save(name, tmp_path_factory.mktemp("models")) for name in MODELS}


def made(folder: Path, out: Path, cache: str | None, **options: Any) -> Bundle:
    return export(open_checkpoint(folder), out, ExportOptions(patterns=("fused",), cache_dtype=cache, **options))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, cache: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Through chunks, decoding, growth and rewinding. All that is left of a difference from transformers: sums in another order
    move a value over the middle between two steps: a thousandth of all values in fp16, whose steps are small, and of
    what rounding does the root of that times √12, a tenth. Where only K or only V were rounded it would be 0.7."""
    harness.operators()
    expected, exact = reference(name, cache)[:, 24:], reference(name, None)[:, 24:]
    with open_session(made(folders[name], tmp_path / "out", cache), batch=2, capacity=100, threads=1, chunk=7) as session:
        session.prefill([row[:40] for row in TOKENS])
        session.decode(np.array([3, 5]))
        session.rewind(25)
        found = [session.decode(TOKENS[:, at]).copy() for at in range(25, 60)]
        session.rewind(9)
        again = session.prefill([row[9:60] for row in TOKENS])
    found, effect = np.stack(found, axis=1), rms(expected - exact)
    assert effect > 1e-5 * rms(exact)
    limit = {"fp16": 0.3, "int8": 0.05}[cache] * effect
    assert rms(found - expected[:, 1:]) < limit
    assert rms(again - expected[:, -1]) < limit
    assert effect < {"fp16": 0.003, "int8": 0.03}[cache] * rms(exact)  # it is a cache of that many digits


@pytest.mark.parametrize("cache", CACHES)
def test_the_torch_session_rounds_so_too(cache: str, folders: dict[str, Path]) -> None:
    """What a sweep measures quality on."""
    expected, exact = reference("llama", cache), reference("llama", None)
    with open_torch(open_checkpoint(folders["llama"]), batch=2, capacity=100, chunk=7, cache_dtype=cache) as session:
        found = np.concatenate([logits.copy() for logits in session.score(TOKENS)], axis=1)
        assert session.kv_bytes() == 2 * 60 * 2 * 2 * 2 * {"fp16": 2 * 8, "int8": 8 + 4}[cache]
    assert rms(found - expected) < {"fp16": 0.3, "int8": 0.05}[cache] * rms(expected - exact)


def test_rows_of_torch() -> None:
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    rows[1], rows[2, 3], rows[3, 5], rows[4] = 0, torch.inf, torch.nan, 1e-40
    stored = cache_rows.store(rows, torch.int8)
    assert stored.shape == (5, 28)
    back = cache_rows.load(stored)
    scale = rows[0].abs().max() / 127
    torch.testing.assert_close(back[0], (rows[0] / scale).round() * scale, rtol=0, atol=0)
    assert (back[[1, 4]] == 0).all()
    assert back[2:4].isnan().all()
    assert cache_rows.load(cache_rows.store(rows, torch.float16))[0].equal(rows[0].half().float())


def test_sizes(folders: dict[str, Path], tmp_path: Path) -> None:
    """2 layers of 2 KV heads of 8 channels."""
    harness.operators()
    for cache, row in ((None, 4 * 8), ("fp16", 2 * 8), ("int8", 8 + 4)):
        bundle = made(folders["llama"], tmp_path / str(cache), cache)
        (variant,) = bundle.variants
        assert variant.kv_bytes_per_token == 2 * 2 * 2 * row
        assert variant.precision == ("fp32" if cache is None else f"fp32, {cache} cache")
        with open_session(bundle, capacity=64) as session:
            session.prefill([np.arange(11)])
            assert session.kv_bytes() == 11 * 2 * 2 * 2 * row
            assert session._caches.popitem()[1].host.nbytes == 64 * 2 * row  # type: ignore[attr-defined]
        assert inspect(bundle.path)["variants"][0]["kv_bytes_per_token"] == 8 * row
    assert inspect(folders["llama"])["model"]["kv_bytes_per_token"] == {"fp32": 256, "fp16": 128, "bf16": 128, "int8": 96}


def test_with_quantised_weights_and_fewer_heads(tmp_path: Path) -> None:
    harness.operators()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    hf.build("llama", sizes).save_pretrained(tmp_path / "model")
    plain, stored = (
        made(tmp_path / "model", tmp_path / str(cache), cache, quantize="int4", groups=(4, 1)) for cache in (None, "int8")
    )
    assert [variant.precision for variant in stored.variants] == ["fp32, int4 weights, int8 cache"] * 2
    for variant in stored.variants:
        logits = []
        for bundle in (plain, stored):
            with open_session(bundle, variant.name, capacity=80) as session:
                logits.append(session.prefill([np.arange(3, 63)]).copy())
        assert 0 < rms(logits[1] - logits[0]) < 0.3 * rms(logits[0])  # of int8 activations, too


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--pattern", "fused,gqa"],
            "pattern gqa keeps its cache in the dtype of the activations; one of int8 is for the pattern fused, whose operator "
            "converts as it reads",
        ),
        (
            ["--pattern", "fused", "--cache", "concat"],
            "pattern fused does not fit this model: its cache is concat; headpool's operators work on a static cache",
        ),
        (
            ["--pattern", "fused", "--dtype", "fp16"],
            "pattern fused does not fit this model: it is fp16; headpool's operators are for fp32",
        ),
    ],
)
@pytest.mark.parametrize("command", [["export"], ["sweep", "--contexts", "8"]])
def test_what_is_refused(
    command: list[str], words: list[str], message: str, folders: dict[str, Path], tmp_path: Path, capfd
) -> None:
    assert _run([*command, str(folders["llama"]), str(tmp_path / "out"), "--cache-dtype", "int8", *words]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"headpool: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_another_word_is_refused(folders: dict[str, Path], tmp_path: Path, capfd) -> None:
    assert _run(["export", str(folders["llama"]), str(tmp_path / "out"), "--cache-dtype", "int4"]) == 2
    assert "'int4' is not one of fp16, int8" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_dtype": "fp8"}, "(pattern fused, static cache) stores its cache as 'fp8', which it cannot"),
        ({"pattern": "grouped"}, "(pattern grouped, static cache) stores its cache as 'int8', which it cannot"),
        ({"cache": "concat"}, "(pattern fused, concat cache) stores its cache as 'int8', which it cannot"),
        ({"cache_dtype": None}, "its kv_bytes_per_token are not what the contract says for this config"),
        ({"cache_dtype": "fp16"}, "its kv_bytes_per_token are not what the contract says for this config"),
    ],
)
def test_a_damaged_manifest(changes: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    manifest = made(folders["llama"], tmp_path / "out", "int8").path / "headpool.json"
    data = json.loads(manifest.read_text())
    data["variants"][0].update(changes)
    manifest.write_text(json.dumps(data))
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "out")
    assert message in str(caught.value)


def test_a_graph_with_another_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    """fp16 caches have the shape of fp32 ones: the types tell them apart."""
    harness.operators()
    plain, stored = (made(folders["llama"], tmp_path / str(cache), cache) for cache in (None, "fp16"))
    stored.graph_path(stored.variants[0]).write_bytes(plain.graph_path(plain.variants[0]).read_bytes())
    with pytest.raises(EngineError, match="has other inputs than its manifest says"):
        open_session(stored)
