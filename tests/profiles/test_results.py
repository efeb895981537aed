from __future__ import annotations

import copy
import dataclasses
import json
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.errors import UserError
from profiles.report import render
from profiles.results import Results
from profiles.table import results_table

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def small(factory):
    cells = [factory.cell(factory.subject(g), samples=(0.1, 0.2), quality={"loss": 2.5}) for g in (9, (9, 3), 1)]
    return factory.sweep(cells=tuple(cells), notes=("a note",))


def test_round_trip(small, tmp_path):
    path = small.save(tmp_path / "r.json")
    assert Results.load(path) == small
    assert os.listdir(tmp_path) == ["r.json"]


def test_an_output_that_exists_is_refused(small, tmp_path):
    path = small.save(tmp_path / "r.json")
    with pytest.raises(UserError, match="exists; choose another name or remove it"):
        small.save(path)
    with pytest.raises(UserError, match="is not a folder"):
        small.save(tmp_path / "none" / "r.json")


def test_nothing_is_left_when_writing_fails(small, tmp_path):
    broken = dataclasses.replace(small, settings={"x": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "r.json")
    assert not os.listdir(tmp_path)


def test_quality_goes_to_its_variant(small):
    changed = small.with_quality({"g1.grouped": {"loss": 9.0}})
    assert [cell.quality["loss"] for cell in changed.cells] == [2.5, 2.5, 9.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=99), "has schema 99, this headpool reads schema 1; measure it again"),
        (lambda d: d.pop("machine"), "results lacks machine"),
        (lambda d: d.update(extra=1), "results.extra is an unknown key"),
        (lambda d: d["cells"][0].update(samples=[]), "samples are not positive seconds"),
        (lambda d: d["cells"][0].update(samples=[0.1, -1.0]), "samples are not positive seconds"),
        (lambda d: d["cells"][0].update(samples=[True]), r"cells\[0\].samples\[0\] is True: input should be a valid number"),
        (lambda d: d["cells"][1]["subject"].update(groups=0), "0 KV heads for 9 query heads"),
        (lambda d: d["cells"][1]["subject"].update(groups=18), "18 KV heads for 9 query heads"),
        (lambda d: d["cells"][1]["subject"].update(groups="4"), "groups is '4': input should be a valid integer"),
        (lambda d: d["cells"][2].update(kind="speed"), "kind 'speed' is not one of decode, prefill, ttft"),
        (lambda d: d["cells"][2].update(context=1.5), r"cells\[2\].context is 1.5: input should be a valid integer"),
        (lambda d: d["cells"][2].update(breakdown={"gpu": 1.0}), "breakdown class 'gpu' is not one of"),
        (lambda d: d["bandwidth"].update(samples=[]), "bandwidth samples"),
    ],
)
def test_what_cannot_be_is_refused_by_name(small, tmp_path, change, message):
    data = json.loads(json.dumps(small.to_json()))
    change(data)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        Results.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "nonsense", "NaN", '{"schema": 1, "cells": 1e999}', "[" * 100_000, '{"a": "\\ud800"}']
)
def test_files_of_another_kind(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a results file"):
        Results.load(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="does not exist; make one with 'headpool profile'"):
        Results.load(tmp_path / "none.json")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for path, why in ((tmp_path / "b", "is not a results file"), (tmp_path, "is a folder; give the results file in it")):
        with pytest.raises(UserError, match=why):
            Results.load(path)


def load(path):
    """(results, None) or (None, message); any other error but a UserError is the test's failure."""
    try:
        return Results.load(path), None
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None, message


def places(value, path=()):
    """The path of every value inside parsed JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_a_user_error_or_loads_whole(small, tmp_path, data):
    tree = copy.deepcopy(json.loads(json.dumps(small.to_json())))
    *parents, last = data.draw(st.sampled_from([place for place in places(tree) if place]))
    at = tree
    for key in parents:
        at = at[key]
    if data.draw(st.booleans()):
        at[last] = data.draw(JSON)
    else:
        del at[last]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(tree))
    loaded, message = load(path)
    if loaded is None:
        assert message.startswith(str(path))
    else:
        json.dumps(loaded.to_json(), allow_nan=False)
        if loaded.cells:
            assert render([loaded])  # what loads can be shown
            assert results_table(loaded).row_count == len(loaded.cells)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60), cut=st.floats(0, 1))
def test_cut_and_overwritten_bytes(small, tmp_path, raw, cut):
    text = json.dumps(small.to_json()).encode()
    at = int(cut * len(text))
    path = tmp_path / "r.json"
    for damaged in (text[:at], text[:at] + raw + text[at + len(raw) :]):
        path.write_bytes(damaged)
        load(path)
