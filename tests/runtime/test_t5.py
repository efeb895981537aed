"""Encoder-decoders in the C++ runtime, every pattern and cache form, against transformers and the Python engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
import t5
import torch
from building import run
from capi import ARGUMENT, BACKEND, BUNDLE, CAPACITY, MEMORY, Api, CppSession, RuntimeFailure
from test_hostile import edit, refused
from test_t5_sessions import PATTERNS, SOURCES, STEPS, TARGETS, TOLERANCE, expected
from test_t5_sessions import theirs as theirs
from test_turns import ENDED, columns

from exporter.bundle import Bundle, Seq2SeqVariant
from exporter.checkpoint import open_checkpoint
from exporter.engines import open_session
from exporter.export import ExportOptions, export
from exporter.generate import generate

THREE = [*SOURCES, np.arange(20) * 11 % 66 + 1]
STOP = 1
FORMS = {"static": (*PATTERNS, "fused"), "concat": PATTERNS}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = open_checkpoint(t5.save("t5-1.1", folder))
    return {
        cache: export(checkpoint, folder / cache, ExportOptions((2,), patterns=patterns, cache=cache, logits="all"))
        for cache, patterns in FORMS.items()
    }


@pytest.mark.parametrize(("cache", "pattern"), [(cache, pattern) for cache, patterns in FORMS.items() for pattern in patterns])
def test_logits(pattern: str, cache: str, bundles: dict[str, Bundle], theirs: dict[int, Any], api: Api) -> None:
    """Step by step in a batch of unequal sources; then back, and other tokens."""
    wanted = expected(theirs[2])
    opened = api.open(bundles[cache].path, f"g2.{pattern}")
    session = opened.session(batch=2, capacity=150)
    found = [session.prefill(SOURCES), *(session.decode(tokens) for tokens in TARGETS.T[1:])]
    np.testing.assert_allclose(np.stack(found, axis=1), wanted, rtol=0, atol=TOLERANCE)
    assert session.lengths.tolist() == [41 + STEPS, 9 + STEPS]
    assert session.kv_bytes() == (50 + 2 * STEPS + 2) * 2 * 2 * 16 * 4
    session.reset()
    np.testing.assert_allclose(session.prefill(SOURCES[::-1])[::-1], wanted[:, 0], rtol=0, atol=TOLERANCE)
    session.close()
    session = opened.session(batch=2, capacity=150)
    opened.close()  # the session keeps it
    session.prefill([SOURCES[0]] * 2)
    for token in (5, 6, 7):
        session.decode(np.array([token, token + 1]))
    session.rewind(41)
    found = [session.decode(TARGETS[[0, 0], step]) for step in range(1, 6)]
    np.testing.assert_allclose(np.stack(found, axis=1), wanted[[0, 0], 1:6], rtol=0, atol=TOLERANCE)
    session.reset()  # a source that is longer than the one before, and one that is shorter
    for row in (1, 0, 1):
        np.testing.assert_allclose(session.prefill([SOURCES[row]] * 2), wanted[[row, row], 0], rtol=0, atol=TOLERANCE)
        session.reset()


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens(batch: int, bundles: dict[str, Bundle], theirs: dict[int, Any], api: Api) -> None:
    with torch.no_grad():
        ids = [torch.from_numpy(source)[None] for source in THREE[:batch]]
        texts = [theirs[2].generate(i, attention_mask=torch.ones_like(i), max_new_tokens=24, do_sample=False) for i in ids]
    for cache, bundle in bundles.items():
        with open_session(bundle, "g2.grouped", batch=batch, capacity=80, threads=1) as python:
            ours = [tokens.tolist() for tokens in generate(python, THREE[:batch], 24, stop_ids=(STOP,))]
        for pattern in FORMS[cache]:
            session = api.open(bundle.path, f"g2.{pattern}").session(batch=batch, capacity=80)
            found = session.generate(THREE[:batch], 24, stop_ids=(STOP,))
            columns = [[row[b] for row in found if row[b] >= 0] for b in range(batch)]
            assert columns == [text[0, 1:].tolist() for text in texts], (cache, pattern)
            if pattern == "grouped":
                assert found == ours


def test_another_model_is_the_python_engines(api: Api, tmp_path: Path) -> None:
    """All KV heads, a graph of the last logits alone; three decoder layers on two of the encoder."""
    saved = t5.save("t5-wide", tmp_path)
    bundle = export(open_checkpoint(saved), tmp_path / "out", ExportOptions(patterns=("grouped",)))
    model = api.open(bundle.path)
    assert model.info().encoder_layers == 2
    with open_session(bundle, batch=3, capacity=60, threads=1) as python:
        ours = [tokens.tolist() for tokens in generate(python, THREE, 16)]
    assert model.session(batch=3).generate(THREE, 16) == ours


@pytest.mark.parametrize("pattern", PATTERNS)
def test_on_a_fake_cuda(pattern: str, bundles: dict[str, Bundle], fake: Api) -> None:
    with open_session(bundles["static"], f"g2.{pattern}", batch=3, capacity=80, threads=1) as python:
        ours = [tokens.tolist() for tokens in generate(python, THREE, 24)]
    session = fake.open(bundles["static"].path, f"g2.{pattern}", backend="onnxruntime-cuda").session(batch=3, capacity=80)
    for _ in range(2):
        assert session.generate(THREE, 24) == ours
        session.reset()


def ended_pairs(open_one: Callable[[int], CppSession]) -> tuple[CppSession, list[CppSession]]:
    """Three sequences that have ended at different times, and each of them alone."""
    together, alone = open_one(3), [open_one(1) for _ in range(3)]
    texts = [columns(session.generate([source], 24))[0] for session, source in zip(alone, THREE, strict=True)]
    stops = [texts[0][2], texts[1][5]]
    for session in alone:
        session.reset()
    found = columns(together.generate(THREE, 24, stops))
    assert found == [columns(s.generate([p], 24, stops))[0] for s, p in zip(alone, THREE, strict=True)]
    assert len({len(text) for text in found}) > 1
    assert together.lengths.tolist() == [session.lengths[0] for session in alone]
    assert together.kv_bytes() == sum(session.kv_bytes() for session in alone)
    return together, alone


@pytest.mark.parametrize("backend", ["", "onnxruntime-cuda"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_encoder_decoders_go_on_after_their_ends(pattern: str, backend: str, bundles: dict[str, Bundle], fake: Api) -> None:
    opened = fake.open(bundles["static"].path, f"g2.{pattern}", backend=backend)
    together, alone = ended_pairs(lambda batch: opened.session(batch=batch, capacity=80))
    for tokens in ([5, 6, 7], [8, ENDED, 9], [ENDED, 4, 4], [3, 3, 3]):
        logits = together.decode(np.array(tokens))
        for b, token in enumerate(tokens):
            if token != ENDED:
                np.testing.assert_allclose(logits[b], alone[b].decode(np.array([token]))[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_concat_cache_of_an_encoder_decoder_is_in_step(pattern: str, bundles: dict[str, Bundle], api: Api) -> None:
    opened = api.open(bundles["concat"].path, f"g2.{pattern}")
    together, alone = ended_pairs(lambda batch: opened.session(batch=batch, capacity=80))
    lengths = together.lengths
    words = "^a sequence that ended early cannot go on in an encoder-decoder's concat cache; reset the session$"
    with pytest.raises(RuntimeFailure, match=words) as caught:
        together.decode(np.array([5, 6, 7]))
    assert caught.value.status == ARGUMENT
    assert together.lengths.tolist() == lengths.tolist()
    alive = lengths - [len(source) for source in THREE]
    tokens = np.where(alive == alive.max(), 5, ENDED)
    logits = together.decode(tokens)  # those that are the furthest
    for b in np.flatnonzero(tokens != ENDED):
        np.testing.assert_allclose(logits[b], alone[b].decode(np.array([5]))[0], rtol=0, atol=2e-4)
    together.reset()
    ended_pairs(lambda batch: together if batch == 3 else opened.session(capacity=80))


def test_a_concat_cache_rewound_to_what_all_hold_goes_on(bundles: dict[str, Bundle], api: Api) -> None:
    opened = api.open(bundles["concat"].path, "g2.grouped")
    together, alone = opened.session(batch=2, capacity=80), opened.session(capacity=80)
    together.prefill([SOURCES[1]] * 2)
    alone.prefill(SOURCES[1:])
    for tokens in ([3, 3], [4, ENDED], [5, ENDED]):
        together.decode(np.array(tokens))
    alone.decode(np.array([3]))
    together.rewind(len(SOURCES[1]) + 1)
    for token in (7, 8):
        expected = alone.decode(np.array([token]))
        np.testing.assert_allclose(together.decode(np.array([token] * 2)), expected.repeat(2, 0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("cache", ["static", "concat"])
def test_programs(cache: str, bundles: dict[str, Bundle], built: Path) -> None:
    """Sessions as an application uses them; what a step allocates; the example."""
    bundle = bundles[cache]
    output = run(built / "tests/sessions", bundle.path)
    assert output.splitlines() == [f"{variant.name} is sound" for variant in bundle.variants]
    with open_session(bundle, "g2.grouped", capacity=30, threads=1) as python:
        ours = [int(tokens[0]) for tokens in generate(python, SOURCES[1:], 12, stop_ids=(STOP,))]
    output = run(built / "examples/generate", bundle.path, "g2.grouped", 12, *SOURCES[1])
    assert [int(line) for line in output.splitlines() if line.isdigit()] == ours
    for variant in ("g2.grouped", "g2.gqa"):
        cost = json.loads(run(built / "tests/step", bundle.path, variant))
        assert cost["own_allocations"] == 0
        assert cache == "concat" or cost["step_allocations"] == cost["run_allocations"] > 0


def fails(status: int, message: str, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(RuntimeFailure, match=message) as caught:
        call(*arguments)
    assert caught.value.status == status


def test_what_a_session_refuses(bundles: dict[str, Bundle], api: Api) -> None:
    session = api.open(bundles["concat"].path, "g2.grouped").session(capacity=20)
    fails(ARGUMENT, "^an encoder-decoder decodes after a source; give it one with prefill$", session.decode, np.array([1]))
    fails(CAPACITY, "^the source of the encoder has 41 tokens, the capacity is 20$", session.prefill, SOURCES[:1])
    session.prefill(SOURCES[1:])
    fails(ARGUMENT, "^an encoder-decoder reads its source at once; reset the session", session.prefill, SOURCES[1:])
    for _ in range(11):
        session.decode(np.array([3]))
    fails(CAPACITY, "^the cache is full: 20 tokens a sequence$", session.decode, np.array([3]))
    words = "^cannot rewind to 8 tokens: the sources, of 9 to 9 tokens, stay whole, and all sequences in step$"
    fails(ARGUMENT, words, session.rewind, 8)
    both = api.open(bundles["static"].path, "g2.grouped").session(batch=2, capacity=60)
    both.prefill(SOURCES)
    fails(ARGUMENT, "cannot rewind to 9 tokens: the sources, of 9 to 41 tokens, stay whole", both.rewind, 9)
    assert api.open(bundles["static"].path).session().capacity == 8192
    words = "^variant g2.grouped is an encoder-decoder, and backend tensorrt runs decoder-only models; take onnxruntime$"
    with pytest.raises(RuntimeFailure, match=words) as caught:
        api.open(bundles["static"].path, backend="tensorrt")
    assert caught.value.status == BACKEND


@pytest.fixture
def copied(bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["static"].path, tmp_path / "bundle"))


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "parent": (lambda v: v.update(encoder="../encoder.onnx"), "not a file name in its own folder"),
    "a number": (lambda v: v.update(encoder=1), "not a file name in its own folder"),
    "no encoder": (lambda v: v.update(encoder=None), 'input "encoder_attention_mask" has the role "mask"'),
    "missing file": (lambda v: v.update(encoder="nothing.onnx"), 'lacks "nothing.onnx"'),
    "another graph": (lambda v: v.update(encoder=v["graph"]), "the graph has 11 inputs or outputs, headpool.json names 2"),
    "start": (lambda v: v["config"].update(decoder_start_id=67), "decoder_start_id is 67, not a whole number from 0 to 66"),
    "layers": (lambda v: v["config"].pop("encoder_layers"), "it lacks encoder_layers"),
    "hidden": (lambda v: v["config"].update(hidden_size=7), 'binding "last_hidden_state" is'),
    "no inputs": (lambda v: v["encoder_inputs"].clear(), "an input or an output of the encoder is missing"),
    "no outputs": (lambda v: v.pop("encoder_outputs"), "it lacks encoder_outputs"),
    "a cache less": (lambda v: v["encoder_outputs"].pop(), "an input or an output of the encoder is missing"),
    "a cache more": (lambda v: v["encoder_outputs"].append(v["encoder_outputs"][1]), "more caches as outputs than as inputs"),
    "heads": (lambda v: v["encoder_outputs"][1]["shape"].__setitem__(1, 3), "does not belong to input"),
    "rows": (lambda v: v["encoder_outputs"][1]["shape"].__setitem__(2, "capacity"), 'binding "present.0.encoder.key" is'),
    "two names": (lambda v: v["encoder_outputs"][2].update(name="present.0.encoder.key"), "have one name"),
    "names of both": (lambda v: v["inputs"][5].update(name="past_key_values.0.decoder.key"), "have one name"),
    "a role": (lambda v: v["encoder_inputs"][0].update(role="positions"), 'of the encoder has the role "positions"'),
    "no mask": (lambda v: v["inputs"].pop(2), "lacks an input, or has one too many"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_is_not_as_export_writes_it(name: str, copied: Path, api: Api) -> None:
    change, message = CHANGES[name]
    edit(copied, change)
    refused(api, copied, BUNDLE, message)


def test_sizes_that_the_encoder_does_not_have(copied: Path, api: Api) -> None:
    """A manifest that agrees with itself and with the decoder's graph."""

    def change(variant: Any) -> None:
        variant["config"]["hidden_size"] = variant["encoder_outputs"][0]["shape"][2] = 7

    edit(copied, change)
    refused(api, copied, BUNDLE, "the graph's last_hidden_state is not what headpool.json says; export the bundle again")
    (copied / "encoder.g2.grouped.onnx").write_bytes(b"no graph")
    refused(api, copied, BUNDLE, r"^encoder\.g2\.grouped\.onnx is damaged; export the bundle again$")


@pytest.mark.parametrize("part", [0, 0.3, 0.999])
def test_files_that_are_cut_short(part: float, copied: Path, api: Api) -> None:
    """Those of the encoder as well, which is loaded after the decoder."""
    variant = Bundle.open(copied).variant("g2.grouped")
    assert isinstance(variant, Seq2SeqVariant)
    for name in (variant.encoder, variant.graph):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[: int(len(whole) * part)])
        refused(api, copied, BUNDLE, rf"^{name} is damaged; export the bundle again$", "g2.grouped")
        (copied / name).write_bytes(whole)
    weights = sorted(copied.glob("*.safetensors"))
    for file in weights:
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * part)])
        refused(api, copied, BUNDLE, rf"^{file.name} is cut short, it has \d+ bytes; export the bundle again$", "g2.grouped")
        file.unlink()
        refused(api, copied, BUNDLE, f' lacks "{file.name}"; export the bundle again$', "g2.grouped")
        file.write_bytes(whole)
    assert weights


@pytest.mark.parametrize("part", ["encoder_inputs", "encoder_outputs", ""])
def test_random_changes_of_a_manifest(part: str, copied: Path, api: Api) -> None:
    """Any value for any other: what opens must also run."""

    def of(data: Any) -> Any:
        variant = data["variants"][0]
        return {part: variant[part]} if part else variant

    values = [7, "batch", "encoder", "static", "concat", "hidden", "mask", "input_ids", "present.0.encoder.key"]
    statuses = damage.statuses(api, copied, copied / "headpool.json", values, of)
    assert set(statuses) <= {0, ARGUMENT, BUNDLE, CAPACITY, BACKEND, MEMORY}
    assert statuses.count(0) < 250


def test_mutated_manifests_are_read_or_refused(built: Path, copied: Path) -> None:
    assert "3000 mutations" in run(built / "tests/fuzz", 3000, copied / "headpool.json")
