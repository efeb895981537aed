"""The C++ runtime on ONNX Runtime's CUDA provider. The CPU's stands in for it, with device memory that is full of NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from capi import BACKEND, Api, RuntimeFailure
from test_ort_session import FORMS, Mirror
from test_session import whole

from exporter.bundle import Bundle
from exporter.engines import open_session
from exporter.generate import generate
from exporter.models.decoder import Decoder

CUDA = "onnxruntime-cuda"
PATTERNS = [pattern for pattern, cache in FORMS if cache == "static"]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny.decoder()


@pytest.fixture(scope="module")
def bundles(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    made = {pattern: tiny.bundle(tmp_path_factory.mktemp(pattern), model, pattern) for pattern in PATTERNS}
    for bundle in made.values():
        whole(bundle)
    return made


def refusal(api: Api, bundle: Path) -> str:
    with pytest.raises(RuntimeFailure) as caught:
        api.open(bundle, backend=CUDA)
    assert caught.value.status == BACKEND
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sessions_over_memory_of_a_device(pattern: str, bundles: dict[str, Bundle], model: Decoder, fake: Api) -> None:
    opened = fake.open(bundles[pattern].path, backend=CUDA)
    Mirror(opened.session(capacity=300, chunk=16), model).one_sequence()  # type: ignore[arg-type]
    Mirror(opened.session(batch=3, capacity=120, chunk=16), model).unequal_lengths()  # type: ignore[arg-type]
    opened.close()


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_the_python_engines(batch: int, bundles: dict[str, Bundle], fake: Api) -> None:
    prompts = [np.random.default_rng(1).integers(0, 61, length) for length in (9, 30, 4)[:batch]]
    with open_session(bundles["gqa"], batch=batch, capacity=120, threads=1) as session:
        expected = [tokens.tolist() for tokens in generate(session, prompts, 40)]
    session = fake.open(bundles["gqa"].path, backend=CUDA).session(batch=batch, capacity=120)
    assert session.generate(prompts, 40) == expected


def test_what_only_the_cpu_runs_is_refused(model: Decoder, fake: Api, tmp_path: Path) -> None:
    for name, form, words in (
        (
            "fused",
            ("fused", "static"),
            "variant v is in pattern fused, whose operators compute on the CPU; on onnxruntime-cuda take",
        ),
        (
            "concat",
            ("grouped", "concat"),
            "variant v has a concat cache, and onnxruntime-cuda takes static ones; export it with",
        ),
    ):
        (tmp_path / name).mkdir()
        bundle = whole(tiny.bundle(tmp_path / name, model, *form))  # type: ignore[arg-type]
        assert refusal(fake, bundle).startswith(words)


def test_on_the_onnx_runtime_of_this_machine(bundles: dict[str, Bundle], model: Decoder, api: Api) -> None:
    """Without the provider it says what there is; with one, logits, or why it does not start."""
    bundle = bundles["grouped"].path
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        names = ", ".join(onnxruntime.get_available_providers())
        assert refusal(api, bundle) == (
            f"ONNX Runtime {onnxruntime.__version__} here has no CUDAExecutionProvider (it has {names}); "
            "put the library of onnxruntime-gpu in its place, or take backend onnxruntime"
        )
        return
    try:
        opened = api.open(bundle, backend=CUDA)
    except RuntimeFailure as caught:
        failure = caught
    else:
        failure = None
    if failure:  # no driver, or another CUDA than the provider's
        assert failure.status == BACKEND
        return
    Mirror(opened.session(batch=3, capacity=120, chunk=16), model).unequal_lengths()  # type: ignore[arg-type]
