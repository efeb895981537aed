"""C++ sessions, through the C ABI, against the torch model and the Python engine's greedy tokens, on every pattern and form.

On ONNX Runtime's CUDA provider too: the CPU's stands in for it, with device memory that is full of NaN.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import hf
import numpy as np
import onnxruntime
import pytest
import tiny
from building import run
from capi import BACKEND, Api, CppSession, RuntimeFailure
from test_ort_session import FORMS, Mirror

from exporter.bundle import MANIFEST, Bundle
from exporter.checkpoint import open_checkpoint
from exporter.engines import open_session
from exporter.export import ExportOptions, export
from exporter.generate import generate
from exporter.models.decoder import Decoder

ALL = [*FORMS, ("fused", "static")]


def whole(bundle: Bundle) -> Path:
    """The bundle's folder, now with a manifest."""
    (bundle.path / MANIFEST).write_text(json.dumps(bundle.to_json()))
    return bundle.path


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny.decoder()


@pytest.fixture(scope="module")
def bundles(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for form in ALL:
        folder = tmp_path_factory.mktemp("-".join(form))
        made[form] = whole(tiny.bundle(folder, model, *form))  # type: ignore[arg-type]
    return made


def mirror_of(session: CppSession, model: Decoder) -> Mirror:
    return Mirror(session, model)  # type: ignore[arg-type]


CAPACITIES = [300, 0]  # with a chosen one the cache of pattern fused is bound once, with none it grows


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("form", ALL, ids="-".join)
def test_one_sequence(
    form: tuple[str, str], capacity: int, bundles: dict[tuple[str, str], Path], model: Decoder, api: Api
) -> None:
    session = api.open(bundles[form]).session(capacity=capacity, chunk=16)
    mirror = mirror_of(session, model)
    mirror.one_sequence()
    mirror.prefill(200)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("form", ALL, ids="-".join)
def test_unequal_lengths_in_a_batch(
    form: tuple[str, str], capacity: int, bundles: dict[tuple[str, str], Path], model: Decoder, api: Api
) -> None:
    session = api.open(bundles[form], threads=2).session(batch=3, capacity=capacity, chunk=16)
    mirror_of(session, model).unequal_lengths()


@pytest.mark.parametrize("form", ALL, ids="-".join)
def test_glu_attention(form: tuple[str, str], tmp_path: Path, api: Api) -> None:
    """V heads of 8 channels beside K heads of 16; `one_sequence` and `unequal_lengths` also count the cache's bytes."""
    model = tiny.decoder(dataclasses.replace(tiny.CONFIG, glu_value_dim=8))
    opened = api.open(whole(tiny.bundle(tmp_path, model, *form)))  # type: ignore[arg-type]
    mirror_of(opened.session(capacity=300, chunk=16), model).one_sequence()
    mirror_of(opened.session(batch=3, capacity=120, chunk=16), model).unequal_lengths()


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("form", [form for form in ALL if form[1] == "static"], ids="-".join)
def test_a_rewind_that_leaves_few_rows(
    form: tuple[str, str], capacity: int, bundles: dict[tuple[str, str], Path], model: Decoder, api: Api
) -> None:
    session = api.open(bundles[form]).session(batch=2, capacity=capacity)
    mirror = mirror_of(session, model)
    for length in (20, 1, 64):
        mirror.prefill(*(290 - session.lengths - [0, 90]))
        mirror.rewind(length)
        mirror.decode(3)
        mirror.prefill(30, 5)


@pytest.mark.parametrize("form", [("grouped", "static"), ("grouped", "concat"), ("fused", "static")], ids="-".join)
def test_every_row_of_the_capacity_can_be_used_and_no_more(
    form: tuple[str, str], bundles: dict[tuple[str, str], Path], model: Decoder, api: Api
) -> None:
    session = api.open(bundles[form]).session(batch=2, capacity=50, chunk=16)
    mirror = mirror_of(session, model)
    mirror.prefill(44, 3)
    mirror.prefill(5, 46)  # row 0 is almost full: a pad must not be written past its end
    mirror.decode(1)
    with pytest.raises(RuntimeFailure, match=r"^the cache is full: 50 tokens a sequence$"):
        session.decode(np.array([1, 2]))
    session.rewind(10)
    with pytest.raises(RuntimeFailure, match=r"^prompts\[1\] needs 10 \+ 41 cache rows, the capacity is 50$"):
        session.prefill([np.ones(1, np.int64), np.ones(41, np.int64)])
    assert session.lengths.tolist() == [10, 10]


def test_pads_of_a_concat_cache_go_before_they_outgrow_it(
    bundles: dict[tuple[str, str], Path], model: Decoder, api: Api
) -> None:
    session = api.open(bundles["grouped", "concat"]).session(batch=3, capacity=64, chunk=16)
    mirror = mirror_of(session, model)
    for turn in range(9):  # 162 columns for 60 tokens a sequence; there is room for 128
        mirror.prefill(*(18 if turn % 3 == row else 1 for row in range(3)))
    mirror.decode(3)


@pytest.mark.parametrize("form", [("grouped", "static"), ("gqa", "static")], ids="-".join)
def test_half_precision(form: tuple[str, str], model: Decoder, api: Api, tmp_path: Path) -> None:
    bundle = whole(tiny.bundle(tmp_path, model, *form, dtype="fp16"))  # type: ignore[arg-type]
    session = api.open(bundle).session(batch=2, capacity=100)
    rows = [np.arange(3, 30), np.arange(20, 28)]
    expected = np.stack([tiny.full_logits(model, row)[-1] for row in rows])
    np.testing.assert_allclose(session.prefill(rows), expected, rtol=0, atol=tiny.HALF)


def test_decoding_allocates_nothing_of_its_own(
    bundles: dict[tuple[str, str], Path], model: Decoder, built: Path, tmp_path: Path
) -> None:
    """Nor in half precision, whose logits are converted, in a graph that gives all of them, or where a cache grows."""
    folders = [tmp_path / name for name in ("half", "all")]
    for folder in folders:
        folder.mkdir()
    half = whole(tiny.bundle(folders[0], model, dtype="fp16"))
    every = whole(tiny.bundle(folders[1], model, logits="all"))
    for path in (half, every, *(path for form, path in bundles.items() if form[1] == "concat")):
        cost = json.loads(run(built / "tests/step", path, "v", 2))
        assert cost["own_allocations"] == 0
        assert cost.get("step_allocations") == cost.get("run_allocations"), path


def test_graphs_that_give_all_logits(model: Decoder, api: Api, tmp_path: Path) -> None:
    session = api.open(whole(tiny.bundle(tmp_path, model, logits="all"))).session(batch=2, capacity=100, chunk=16)
    mirror = mirror_of(session, model)
    mirror.prefill(20, 20)
    mirror.prefill(3, 9)
    mirror.decode(2)


@pytest.mark.parametrize("form", [("fused", "static"), ("grouped", "static"), ("gqa", "concat")], ids="-".join)
def test_sessions_of_one_model_in_threads(
    form: tuple[str, str], bundles: dict[tuple[str, str], Path], model: Decoder, api: Api
) -> None:
    """More of them than the model has threads, whose parts of several steps wait for each other's."""
    opened = api.open(bundles[form], threads=3)
    sessions = [opened.session(batch=1 + i % 2, capacity=90, chunk=16) for i in range(4)]
    opened.close()  # the sessions keep it
    failures: list[BaseException] = []

    def work(session: CppSession) -> None:
        try:
            mirror = mirror_of(session, model)
            mirror.prefill(*(40, 7)[: session.batch])
            mirror.decode(20)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


CUDA = "onnxruntime-cuda"


@pytest.mark.parametrize("pattern", ["grouped", "gqa", "attention"])
def test_over_memory_of_a_device(pattern: str, bundles: dict[tuple[str, str], Path], model: Decoder, fake: Api) -> None:
    opened = fake.open(bundles[pattern, "static"], backend=CUDA)
    info = opened.info()
    assert (info.backend, info.provider, info.library) == (b"onnxruntime-cuda", b"CUDAExecutionProvider", b"onnxruntime")
    assert info.library_version.decode() == onnxruntime.__version__
    mirror_of(opened.session(capacity=300, chunk=16), model).one_sequence()
    mirror_of(opened.session(batch=3, capacity=120, chunk=16), model).unequal_lengths()
    opened.close()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (
            ("fused", "static"),
            "^variant v is in pattern fused, whose operators compute on the CPU; on onnxruntime-cuda take anoth",
        ),
        (
            ("grouped", "concat"),
            "^variant v has a concat cache, and onnxruntime-cuda takes static ones; export it with --cache st",
        ),
    ],
)
def test_what_only_the_cpu_runs(form: tuple[str, str], words: str, bundles: dict[tuple[str, str], Path], fake: Api) -> None:
    with pytest.raises(RuntimeFailure, match=words) as caught:
        fake.open(bundles[form], backend=CUDA)
    assert caught.value.status == BACKEND


def test_cuda_on_the_onnx_runtime_of_this_machine(bundles: dict[tuple[str, str], Path], model: Decoder, api: Api) -> None:
    """Without the provider it says what there is; with one, logits, or why it does not start."""
    failure = None
    try:
        opened = api.open(bundles["grouped", "static"], backend=CUDA)
    except RuntimeFailure as caught:
        failure = caught
    if failure is None:
        mirror_of(opened.session(batch=3, capacity=120, chunk=16), model).unequal_lengths()
        return
    assert failure.status == BACKEND
    assert "\n" not in str(failure)
    if "CUDAExecutionProvider" not in (available := onnxruntime.get_available_providers()):
        assert str(failure) == (
            f"ONNX Runtime {onnxruntime.__version__} here has no CUDAExecutionProvider (it has {', '.join(available)}); "
            "put the library of onnxruntime-gpu in its place, or take backend onnxruntime"
        )


def greedy(bundle: Bundle, variant: str, prompts: list[np.ndarray], count: int) -> list[list[int]]:
    with open_session(bundle, variant, batch=len(prompts), threads=1) as session:
        return [tokens.tolist() for tokens in generate(session, prompts, count)]


def test_greedy_tokens_are_the_python_engines(api: Api, tmp_path: Path) -> None:
    """On bundles that export wrote: weights in files, shared by two numbers of KV heads."""
    saved, random = hf.save("llama", tmp_path), np.random.default_rng(1)
    prompts = [random.integers(0, 67, length) for length in (9, 30, 4)]
    for cache, patterns in (("static", ("fused", "grouped", "gqa", "attention")), ("concat", ("grouped", "gqa", "repeat"))):
        options = ExportOptions(patterns=patterns, groups=(2, 1), cache=cache)  # type: ignore[arg-type]
        bundle = export(open_checkpoint(saved), tmp_path / cache, options)
        for variant in bundle.variants:
            opened = api.open(bundle.path, variant.name)
            for batch in (1, 3):
                found = opened.session(batch=batch).generate(prompts[:batch], 40)
                assert found == greedy(bundle, variant.name, prompts[:batch], 40), variant.name


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("pattern", ["fused", "gqa"])
def test_quantised_weights(pattern: str, quantize: str, api: Api, built: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf.build("llama", sizes).save_pretrained(tmp_path / "model")
    options = ExportOptions(patterns=(pattern,), quantize=quantize)  # type: ignore[arg-type]
    bundle = export(open_checkpoint(tmp_path / "model"), tmp_path / "bundle", options)
    opened = api.open(bundle.path)
    assert (opened.info().dtype, opened.info().quantize) == (b"fp32", quantize.encode())
    assert json.loads(run(built / "tests/step", bundle.path, bundle.variants[0].name))["own_allocations"] == 0
    theirs, ours = open_session(bundle, capacity=60), opened.session(capacity=60)
    prompt = [np.arange(3, 43)]  # many rows, then one at a time
    np.testing.assert_allclose(ours.prefill(prompt), theirs.prefill(prompt), atol=1e-5)
    for token in np.arange(50, 60):
        np.testing.assert_allclose(ours.decode(np.array([token])), theirs.decode(np.array([token])), atol=1e-5)
    prompts = [np.random.default_rng(1).integers(0, 67, length) for length in (9, 30, 4)]
    assert opened.session(batch=3, capacity=80).generate(prompts, 40) == greedy(bundle, bundle.variants[0].name, prompts, 40)


@pytest.mark.parametrize("capacity", [110, 0])
@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_stored_caches(cache: str, capacity: int, api: Api, built: Path, tmp_path: Path) -> None:
    """Through growth, rewinding and unequal lengths; the tokens, and the bytes, are those of the Python engine."""
    saved = hf.save("llama", tmp_path)
    bundle = export(open_checkpoint(saved), tmp_path / "bundle", ExportOptions(patterns=("fused",), cache_dtype=cache))
    opened = api.open(bundle.path)
    info, (variant,) = opened.info(), bundle.variants
    assert (info.dtype, info.cache_dtype, info.kv_bytes_per_token) == (b"fp32", cache.encode(), variant.kv_bytes_per_token)
    assert json.loads(run(built / "tests/step", bundle.path, variant.name))["own_allocations"] == 0
    theirs, ours = open_session(bundle, capacity=110), opened.session(capacity=capacity)
    steps = [np.arange(3, 60), *(np.array([token]) for token in range(60, 66)), 40, np.arange(40, 49), 12, np.arange(5, 66)]
    for step in steps:
        if isinstance(step, int):
            theirs.rewind(step)
            ours.rewind(step)
        else:
            np.testing.assert_allclose(ours.prefill([step]), theirs.prefill([step]), atol=1e-5)
            assert ours.kv_bytes() == theirs.kv_bytes() == int(theirs.lengths.sum()) * variant.kv_bytes_per_token
    prompts = [np.random.default_rng(1).integers(0, 67, length) for length in (9, 30, 4)]
    assert opened.session(batch=3, capacity=capacity).generate(prompts, 70) == greedy(bundle, variant.name, prompts, 70)
