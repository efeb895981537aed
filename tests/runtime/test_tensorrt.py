"""The C++ runtime on TensorRT engines: which it takes, what its sessions do. ONNX Runtime stands in for the GPU."""

from __future__ import annotations

import ctypes as c
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import fake_engines
import numpy as np
import pytest
import tiny
from capi import ARGUMENT, BACKEND, BUNDLE, MEMORY, Api, ModelOptions, RuntimeFailure
from test_ort_session import Mirror
from test_session import whole

from exporter.bundle import Bundle
from exporter.engines import open_session
from exporter.engines.tensorrt import record
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions
from exporter.generate import generate
from exporter.models.decoder import Decoder

BACKENDS = ("tensorrt", "tensorrt-rtx")


class Counts(c.Structure):
    """What the fake GPU was asked for so far."""

    _fields_ = tuple((name, c.c_int) for name in ("lanes", "allocations", "runs", "captures", "launches"))

    def asked(self) -> dict[str, int]:
        return {name: getattr(self, name) for name, _ in self._fields_}


def counts(fake: Api) -> Counts:
    fake.c.fake_counts.restype = c.POINTER(Counts)
    found: Counts = fake.c.fake_counts().contents
    return found


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny.decoder()


@pytest.fixture
def bundle(model: Decoder, tmp_path: Path) -> Bundle:
    """One variant, "v", pattern attention, with engines of neither backend."""
    made = tiny.bundle(tmp_path, model, "attention")
    whole(made)
    return made


def refused(api: Api, bundle: Bundle, status: int, message: str, backend: str = "tensorrt", **session: int) -> None:
    with pytest.raises(RuntimeFailure, match=message) as caught:
        api.open(bundle.path, backend=backend).session(**session)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_without_the_sdk_it_says_so(bundle: Bundle, api: Api) -> None:
    """On a machine with an SDK: that there is no engine, or that the SDK is the other one."""
    for backend in BACKENDS:
        words = rf"^backend {backend} is not in this libheadpool, which was|has no {backend} engine of variant v; make one:"
        refused(api, bundle, BACKEND, words, backend)
    refused(
        api,
        bundle,
        ARGUMENT,
        "^backend cuda is unknown; choose from onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx$",
        "cuda",
    )
    for backend in ("", "onnxruntime"):
        api.open(bundle.path, backend=backend).session(capacity=8).prefill([np.array([1, 2])])


def test_a_program_built_before_there_were_backends(bundle: Bundle, api: Api) -> None:
    handle, options = c.c_void_p(), ModelOptions(threads=1, backend=b"not read")
    options.size = ModelOptions.backend.offset
    api.check(api.c.hp_model_open(str(bundle.path).encode(), c.byref(options), c.byref(handle)))
    api.c.hp_model_free(handle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["attention", "grouped"])
def test_sessions_give_the_models_logits(pattern: str, backend: str, model: Decoder, fake: Api, tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path, model, pattern)
    whole(bundle)
    fake_engines.add(bundle, bundle.variants[0], backend, capacity=300, prefill=16)
    fake_engines.add(bundle, bundle.variants[0], backend, batch=3, prefill=16)
    opened = fake.open(bundle.path, backend=backend)
    Mirror(opened.session(), model).one_sequence()  # type: ignore[arg-type]
    Mirror(opened.session(batch=3, chunk=7), model).unequal_lengths()  # type: ignore[arg-type]
    opened.close()


def test_graphs_that_give_all_logits_and_half_precision(model: Decoder, fake: Api, tmp_path: Path) -> None:
    for name, dtype in (("single", "fp32"), ("half", "fp16")):
        (tmp_path / name).mkdir()
        bundle = tiny.bundle(tmp_path / name, model, dtype=dtype, logits="all")
        whole(bundle)
        fake_engines.add(bundle, bundle.variants[0], "tensorrt", batch=2, prefill=16)
        session = fake.open(bundle.path, backend="tensorrt").session(batch=2)
        for lengths in ((27, 8), (27, 27)):  # a last call of one token, and of several
            rows = [np.arange(3, 3 + lengths[0]), np.arange(20, 20 + lengths[1])]
            expected = np.stack([tiny.full_logits(model, row)[-1] for row in rows])
            session.reset()
            np.testing.assert_allclose(session.prefill(rows), expected, rtol=0, atol=tiny.HALF if dtype == "fp16" else 2e-4)


@pytest.mark.parametrize(("backend", "captures"), [("tensorrt", 1), ("tensorrt-rtx", 0)])
def test_a_step_is_one_graph_and_allocates_nothing(backend: str, captures: int, bundle: Bundle, fake: Api) -> None:
    fake_engines.add(bundle, bundle.variants[0], backend)
    opened = fake.open(bundle.path, backend=backend)
    session, before = opened.session(), counts(fake).asked()
    for token in range(10):
        session.decode(np.array([token]))
    after = {name: value - before[name] for name, value in counts(fake).asked().items()}
    assert after == {"lanes": 0, "allocations": 0, "runs": 10, "captures": captures, "launches": 9 * captures}
    opened.session().prefill([np.arange(40)])  # of the same engine
    assert counts(fake).lanes == before["lanes"] + 1


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_the_python_engines(batch: int, bundle: Bundle, fake: Api) -> None:
    fake_engines.add(bundle, bundle.variants[0], "tensorrt", batch=batch)
    prompts = [np.random.default_rng(1).integers(0, 61, length) for length in (9, 30, 4)[:batch]]
    with open_session(bundle, batch=batch, capacity=120, threads=1) as session:
        expected = [tokens.tolist() for tokens in generate(session, prompts, 40)]
    assert fake.open(bundle.path, backend="tensorrt").session(batch=batch).generate(prompts, 40) == expected


def test_sessions_of_one_model_in_threads(bundle: Bundle, model: Decoder, fake: Api) -> None:
    fake_engines.add(bundle, bundle.variants[0], "tensorrt")
    opened = fake.open(bundle.path, backend="tensorrt")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            mirror = Mirror(opened.session(capacity=90), model)  # type: ignore[arg-type]
            mirror.prefill(10)
            mirror.decode(40)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_engine_that_fits_is_chosen(bundle: Bundle, fake: Api) -> None:
    variant = bundle.variants[0]
    for capacity, changes in ((64, {"quantize": "int8"}), (80, {}), (50, {"strip": True}), (120, {}), (99, {"batch": 2})):
        fake_engines.add(bundle, variant, "tensorrt", **{"capacity": capacity, "prefill": 16, **changes})
    opened = fake.open(bundle.path, backend="tensorrt")
    session = opened.session(capacity=70)
    assert (session.capacity, opened.session().capacity, opened.session(batch=2).capacity) == (70, 120, 99)
    for file in sorted(bundle.path.glob("engines/*/*.engine")):
        if file.name != "model.v.1.engine":
            file.unlink()
    fake.open(bundle.path, backend="tensorrt").session(capacity=30)  # the smallest with plain weights


def test_an_engine_is_found_from_another_working_directory(
    bundle: Bundle, fake: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first session reads it, maybe long after the model was opened by a relative path."""
    fake_engines.add(bundle, bundle.variants[0], "tensorrt")
    monkeypatch.chdir(bundle.path.parent)
    opened = fake.open(Path(bundle.path.name), backend="tensorrt")
    monkeypatch.chdir("/")
    assert opened.session().prefill([np.arange(5)]).std() > 0.3


def test_what_does_not_fit_is_refused_with_both_sides(bundle: Bundle, fake: Api) -> None:
    variant = bundle.variants[0]
    refused(fake, bundle, BACKEND, r"has no tensorrt engine of variant v; make one: headpool build \S+ --backend tensorrt")
    fake_engines.add(bundle, variant, "tensorrt", version="9.9.9.9")
    refused(fake, bundle, BACKEND, r"has tensorrt engines built by 9\.9\.9\.9, here is 1\.2\.3\.4; headpool build")
    fake_engines.add(bundle, variant, "tensorrt", strip=True)
    refused(fake, bundle, BACKEND, "engines built with --strip, and only headpool run gives those their weights")
    fake_engines.add(bundle, variant, "tensorrt", targets=("sm86", "sm120"))
    refused(fake, bundle, BACKEND, r"engines for sm86\+sm120, this GPU is sm89; headpool build .* --target here")
    fake_engines.add(bundle, variant, "tensorrt", batch=2)
    refused(fake, bundle, ARGUMENT, "engines for batch 2, this session has 1; headpool build .* --batch 1")
    words = "engines for 120 tokens a sequence, this session wants 121; headpool build .* --capacity 121"
    refused(fake, bundle, ARGUMENT, words, batch=2, capacity=121)
    fake_engines.add(bundle, variant, "tensorrt", batch=2, capacity=12, prefill=8)  # each is named, 12 in 120 too
    refused(fake, bundle, ARGUMENT, words.replace("120", "120, 12"), batch=2, capacity=121)


def test_compatible_engines_run_on_later_versions_and_chips(bundle: Bundle, fake: Api) -> None:
    variant = bundle.variants[0]
    fake_engines.add(bundle, variant, "tensorrt", version="1.10.0", compatible=("version",))
    refused(fake, bundle, BACKEND, r"engines built by 1\.10\.0, here is 1\.2\.3\.4")  # which is the older one
    fake_engines.add(bundle, variant, "tensorrt", version="1.2.3", targets=("sm80",), compatible=("version",))
    refused(fake, bundle, BACKEND, r"engines for sm80, this GPU is sm89")
    fake_engines.add(bundle, variant, "tensorrt", version="1.2.3", targets=("sm80",), compatible=("hardware", "version"))
    assert fake.open(bundle.path, backend="tensorrt").session().prefill([np.arange(5)]).std() > 0.3


def test_what_headpool_build_wrote_is_read(model: Decoder, fake: Api, tmp_path: Path) -> None:
    """By TensorRT for RTX itself; then with a plan that the fake understands."""
    bundle = tiny.bundle(tmp_path, model, "attention", dtype="fp16")
    whole(bundle)
    (made,) = build(bundle, BuildOptions(targets=("sm86", "sm89"), batch=2, capacity=32, prefill=8))
    refused(fake, bundle, BACKEND, rf"engines built by {made.record.recipe.version}, here is 1\.2\.3\.4", "tensorrt-rtx")
    text = (made.folder / record.MANIFEST).read_text().replace(made.record.recipe.version, fake_engines.VERSION)
    (made.folder / record.MANIFEST).write_text(text)
    refused(fake, bundle, BACKEND, "does not load|cannot read it", "tensorrt-rtx", batch=2)
    (engine,) = record.read(made.folder)
    plan = f"2 32 8 {bundle.graph_path(bundle.variants[0])}"
    record.write(made.folder, (fake_engines.set_plan(made.folder, engine, plan),))
    session = fake.open(bundle.path, backend="tensorrt-rtx").session(batch=2)
    rows = [np.arange(3, 20), np.arange(20, 28)]
    expected = np.stack([tiny.full_logits(model, row)[-1] for row in rows])
    np.testing.assert_allclose(session.prefill(rows), expected, rtol=0, atol=tiny.HALF)


def test_plans_of_every_length_have_their_hash(bundle: Bundle, fake: Api) -> None:
    folder = fake_engines.add(bundle, bundle.variants[0], "tensorrt")
    (engine,) = record.read(folder)
    plan = (folder / engine.file).read_text()
    start = -(-len(plan) // 64) * 64
    for length in (start, *(start + rest for rest in (1, 55, 56, 57, 63, 64))):
        record.write(folder, (fake_engines.set_plan(folder, engine, plan.ljust(length)),))
        fake.open(bundle.path, backend="tensorrt").session()


def test_damaged_plans_are_refused(bundle: Bundle, fake: Api, tmp_path: Path) -> None:
    folder = fake_engines.add(bundle, bundle.variants[0], "tensorrt")
    plan = folder / "model.v.0.engine"
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    refused(fake, bundle, BUNDLE, f"has {len(whole) - 1} bytes, {len(whole)} were built; it is damaged, build it again")
    plan.write_bytes(b"?" + whole[1:])
    refused(fake, bundle, BUNDLE, r"has the SHA-256 \w{12}, \w{12} was built; it is damaged, build it again")
    outside = plan.rename(tmp_path / "outside")
    refused(fake, bundle, BUNDLE, 'lacks "model.v.0.engine"')
    plan.symlink_to(outside)
    refused(fake, bundle, BUNDLE, "is a link that leaves its folder")


def test_a_plan_of_other_sizes_than_engine_json_says(bundle: Bundle, fake: Api) -> None:
    folder = fake_engines.add(bundle, bundle.variants[0], "tensorrt")
    (engine,) = record.read(folder)
    graph = bundle.graph_path(bundle.variants[0])
    record.write(folder, (fake_engines.set_plan(folder, engine, f"1 60 64 {graph}"),))
    words = r"has past_key_values.0.key as fp32 \[1,2,60,16\], memory of its own; headpool.json as fp32 \[1,2,120,16\]"
    refused(fake, bundle, BUNDLE, words)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "parent": (lambda e: e.update(file="../plan"), "not a file name in its own folder"),
    "module": (lambda e: e["recipe"].update(module="os"), 'module is "os", not tensorrt'),
    "batch": (lambda e: e["recipe"].update(batch=2**20), "batch is 1048576, not a whole number from 1 to 65536"),
    "capacity": (lambda e: e["recipe"].update(capacity=2**31), "not a whole number from 1 to 2147483647"),
    "prefill": (lambda e: e["recipe"].update(prefill=121), "prefill is 121, not a whole number from 1 to 120"),
    "profile": (lambda e: e["profiles"][0].update(most=65), "is not prefill of 1 to 64 tokens"),
    "profiles": (lambda e: e["profiles"].pop(), "an engine has 1 profiles, not 2"),
    "target": (lambda e: e["recipe"].update(targets=[89]), "a target is 89, not a text"),
    "strip": (lambda e: e["recipe"].update(strip="no"), 'strip is "no", neither true nor false'),
    "alias": (lambda e: e["bindings"][-1].update(alias="input_ids"), "the memory of input_ids; headpool.json as"),
    "no alias": (lambda e: e["bindings"][-1].update(alias=None), "memory of its own; headpool.json as"),
    "shape": (
        lambda e: e["bindings"][2]["shape"].__setitem__(2, 121),
        r"\[1,2,121,16\].* headpool.json as fp32 \[1,2,120,16\]",
    ),
    "dtype": (lambda e: e["bindings"][0].update(dtype="int32"), r"input_ids as int32 .* headpool.json as int64"),
    "name": (lambda e: e["bindings"][0].update(name="ids\n2"), "has no input_ids; build the engine again"),
    "one more": (lambda e: e["bindings"].append(e["bindings"][0]), "has 12 inputs and outputs, headpool.json 11"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_engine_json_that_is_not_as_build_writes_it(name: str, bundle: Bundle, fake: Api) -> None:
    file = fake_engines.add(bundle, bundle.variants[0], "tensorrt") / record.MANIFEST
    data = json.loads(file.read_text())
    change, message = CHANGES[name]
    change(data["engines"][0])
    file.write_text(json.dumps(data))
    refused(fake, bundle, BUNDLE, message)


def test_sizes_without_an_address(bundle: Bundle, fake: Api) -> None:
    """An engine.json and a plan that agree: 2³¹ − 1 tokens of 65536 sequences."""
    most = 2**31 - 1
    fake_engines.add(bundle, bundle.variants[0], "tensorrt", batch=65536, capacity=most, prefill=most)
    refused(fake, bundle, MEMORY, "no GPU memory for|no address", batch=65536, capacity=8)


def test_random_changes_of_an_engine_json(bundle: Bundle, fake: Api) -> None:
    """Any value for any other: what opens must also run."""
    file = fake_engines.add(bundle, bundle.variants[0], "tensorrt") / record.MANIFEST
    statuses = damage.statuses(fake, bundle.path, file, [64, "tensorrt", "sm89", "input_ids"], backend="tensorrt")
    assert set(statuses) <= {0, ARGUMENT, BUNDLE, BACKEND, MEMORY}
    assert 0 < statuses.count(0) < 250  # some values mean nothing to the runtime


def test_on_the_sdk_of_this_machine(model: Decoder, api: Api, tmp_path: Path) -> None:
    """Logits on a GPU; without the SDK, without a GPU, or built against another version than the wheel's, one line."""
    bundle = tiny.bundle(tmp_path, model, "attention", dtype="fp16")
    whole(bundle)
    with pytest.raises(RuntimeFailure) as caught:
        api.open(bundle.path, backend="tensorrt-rtx")
    assert caught.value.status == BACKEND
    if "not in this libheadpool" in str(caught.value):  # it was built without the SDK
        return
    build(bundle, BuildOptions(batch=2, capacity=32, prefill=8))
    refusal = None
    try:
        session = api.open(bundle.path, backend="tensorrt-rtx").session(batch=2)
    except RuntimeFailure as failure:
        refusal = failure
    if refusal:
        assert refusal.status == BACKEND
        assert any(words in str(refusal) for words in ("run on an NVIDIA GPU", "engines built by", "this GPU is"))
        return
    rows = [np.arange(3, 20), np.arange(20, 28)]
    expected = np.stack([tiny.full_logits(model, row)[-1] for row in rows])
    np.testing.assert_allclose(session.prefill(rows), expected, rtol=0, atol=4 * tiny.HALF)
