"""What a caller may get wrong, of a bundle that is sound: a status of its own, in words, and nothing done."""

from __future__ import annotations

import ctypes as c
from pathlib import Path

import hf
import pytest
from capi import ARGUMENT, Api, OnTokens, RuntimeFailure

from exporter.checkpoint import open_checkpoint
from exporter.export import ExportOptions, export


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arguments")
    return export(open_checkpoint(hf.save("llama", folder)), folder / "bundle", ExportOptions()).path


def test_a_capacity_past_the_models_context_is_that(bundle: Path, api: Api) -> None:
    model = api.open(bundle)
    most = model.info().max_positions
    assert [model.session(capacity=count).capacity for count in (most - 1, most, most + 1, 0)] == [most - 1, most, most, most]


def test_numbers_of_threads(bundle: Path, api: Api) -> None:
    for threads in (-1, 1025, 2**31 - 1):
        words = f"^threads {threads} is not a whole number from 0 \\(default_threads\\(\\)\\) to 1024$"
        with pytest.raises(RuntimeFailure, match=words) as caught:
            api.open(bundle, threads=threads)
        assert caught.value.status == ARGUMENT


def test_a_callback_that_is_null(bundle: Path, api: Api) -> None:
    session = api.open(bundle).session(capacity=8)
    tokens = (c.c_int64 * 2)(1, 2)
    pointers, counts = (c.POINTER(c.c_int64) * 1)(tokens), (c.c_size_t * 1)(2)
    rest = (c.c_int64(2), None, None, c.c_size_t(0))
    for pointer in (None, OnTokens()):
        assert api.c.hp_generate(session.handle, pointers, counts, c.c_size_t(1), *rest, pointer, None) == ARGUMENT
        assert api.c.hp_last_error() == b"hp_generate was given NULL"
    assert session.lengths.tolist() == [0]
    pointers = (c.POINTER(c.c_int64) * 1)()
    assert api.c.hp_generate(session.handle, pointers, counts, c.c_size_t(1), *rest, OnTokens(lambda *_: 1), None) == ARGUMENT
    assert api.c.hp_last_error() == b"the prompt is NULL"


def test_pointers_that_are_null(api: Api) -> None:
    calls = (
        "hp_model_open",
        "hp_session_create",
        "hp_session_prefill",
        "hp_session_decode",
        "hp_sampler_create",
        "hp_variants",
    )
    for call in calls:
        assert getattr(api.c, call)(*[None] * 5) == ARGUMENT
        assert api.c.hp_last_error().decode() == f"{call} was given NULL"
    assert [api.c.hp_session_batch(None), api.c.hp_session_capacity(None), api.c.hp_session_kv_bytes(None)] == [0, 0, 0]
    assert not api.c.hp_session_lengths(None)
    for call in ("hp_model_free", "hp_session_free", "hp_sampler_free"):
        getattr(api.c, call)(None)
