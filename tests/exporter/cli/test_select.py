"""`headpool select`, and --plan of convert, export and sweep: from a target to graphs that run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.convert import Converter
from exporter.convert import calibration as calibrating
from exporter.engines import open_session
from exporter.engines.torch_eager import open_torch

SELECT = ("--calibration", "random", "--seed", "3")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "WINDOWS", 3)
    monkeypatch.setattr(calibrating, "WINDOW", 16)


@pytest.fixture
def planned(headpool, made: Path, tmp_path: Path) -> Path:
    """plan.json with 2 KV heads in one layer of made's model and 1 in the other."""
    code, out, err = headpool("select", made / "model", "--kv-budget", "0.75", *SELECT, "--out", tmp_path / "plan.json")
    assert code == 0, err
    assert "← chosen" in out
    assert "measured as a whole" in out
    return tmp_path / "plan.json"


def test_a_plan_is_followed_to_every_pattern(headpool, made: Path, planned: Path, tmp_path: Path) -> None:
    """The converted checkpoint and every exported graph give the logits of the weights that the plan's method makes."""
    plan = json.loads(planned.read_text())
    assert sorted(plan["kv_heads"]) == [1, 2]
    assert (plan["method"], plan["calibration"], plan["seed"]) == ("optimal", "random", 3)
    assert planned.with_name("plan.measured.json").is_file()
    assert headpool("convert", made / "model", tmp_path / "out", "--plan", planned)[0] == 0
    converted = open_checkpoint(tmp_path / "out")
    assert list(converted.config.kv_heads) == plan["kv_heads"]
    source = open_checkpoint(made / "model")
    config, weights = Converter(source, "optimal", 3, calibration="random")(tuple(plan["kv_heads"]))
    prompt = np.arange(12)
    with open_torch(dataclasses.replace(source, config=config, weights=weights), capacity=16) as session:
        expected = session.prefill([prompt])[0]
    with open_torch(converted, capacity=16) as session:
        np.testing.assert_allclose(session.prefill([prompt])[0], expected, rtol=0, atol=1e-4)
    patterns = "grouped,gqa,attention,repeat"
    assert headpool("export", made / "model", tmp_path / "bundle", "--plan", planned, "--patterns", patterns)[0] == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert len(bundle.variants) == 4
    for variant in bundle.variants:
        assert variant.conversion is not None
        assert variant.conversion["method"] == "optimal"
        with open_session(bundle, variant, batch=1, capacity=16, threads=1) as session:
            np.testing.assert_allclose(session.prefill([prompt])[0], expected, rtol=0, atol=1e-3)
    config_json = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config_json["num_key_value_heads_per_layer"] == plan["kv_heads"]
    assert not (tmp_path / "bundle" / "genai_config.json").exists()


def test_a_plan_of_other_weights_or_without_its_text(headpool, refused, made: Path, planned: Path, tmp_path: Path) -> None:
    plan = json.loads(planned.read_text())
    planned.write_text(json.dumps(plan | {"kv_digest": "0" * 64}))
    code, _, err = headpool("convert", made / "model", tmp_path / "out", "--plan", planned)
    assert code == 0
    assert f"{planned} was chosen for other weights than model's, those of model; it is followed all the same" in err
    planned.write_text(json.dumps(plan | {"calibration": str(tmp_path / "gone.txt")}))
    assert refused("convert", made / "model", tmp_path / "other", "--plan", planned) == (
        f"{planned} was made with the calibration text {tmp_path / 'gone.txt'}, which is not there; give one with --calibration"
    )


def test_a_sweep_beside_the_plan(headpool, made: Path, planned: Path, tmp_path: Path) -> None:
    """The checkpoint's own heads and the plan on one page; a method that is named goes before the plan's."""
    arguments = ("--contexts", "4", "--samples", "2", "--kinds", "decode", "--threads", "1", "--quality-tokens", "40")
    code, out, err = headpool(
        "sweep", made / "model", tmp_path / "out", "--plan", planned, "--method", "mean", *arguments, "--json"
    )
    assert code == 0, err
    cells = json.loads(out.splitlines()[-1])["cells"]
    assert [cell["groups"] for cell in cells] == [2, json.loads(planned.read_text())["kv_heads"]]
    assert "mean 1.5" in (tmp_path / "out" / "report.html").read_text()
    record = Bundle.open(tmp_path / "out" / "bundle").variants[1].conversion
    assert record is not None
    assert record["method"] == "mean"
    assert "calibration" not in record


def test_another_target_measures_nothing_again(headpool, made: Path, planned: Path, tmp_path: Path) -> None:
    store = planned.with_name("plan.measured.json")
    before = store.stat().st_mtime_ns
    arguments = ("--measurements", store, *SELECT, "--json")
    code, out, err = headpool("select", made / "model", "--max-loss", "1e-9", *arguments, "--out", tmp_path / "two.json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["plan"]["kv_heads"] == [2, 2]
    timed = ("--target-ms", "1000", "--context", "8", "--threads", "1", "--out", tmp_path / "three.json")
    code, out, err = headpool("select", made / "model", *timed, *arguments)
    assert code == 0, err
    data = json.loads(out.splitlines()[-1])
    assert data["plan"]["kv_heads"] == [2, 2]
    assert data["plan"]["found"]["measured_ms"] > 0
    assert all(point["ms"] > 0 for point in data["front"])
    assert store.stat().st_mtime_ns == before


def test_mistakes(refused, made: Path, tmp_path: Path) -> None:
    model = made / "model"
    assert refused("select", model) == "no target given; give exactly one of --kv-budget, --target-ms, --max-loss"
    both = refused("select", model, "--kv-budget", "0.5", "--max-loss", "1")
    assert both == "--kv-budget and --max-loss given; give exactly one of --kv-budget, --target-ms, --max-loss"
    assert refused("select", model, "--kv-budget", "1.5") == "--kv-budget 1.5 is not a number above 0 and at most 1"
    assert refused("select", model, "--max-loss", "nan") == "--max-loss nan is not a number above 0"
    assert refused("select", model, "--kv-budget", "0.3") == (
        "--kv-budget 0.3 cannot be met: the least is 0.5 of the KV cache; choose that or more"
    )
    (tmp_path / "short").write_text("abc" * 3)
    short = refused("select", model, "--kv-budget", "0.5", "--calibration", tmp_path / "short")
    assert short.endswith("calibration needs at least 16; choose a longer text, or self")
    (tmp_path / "short").write_text("abc" * 10)  # one window
    short = refused("select", model, "--kv-budget", "0.5", "--calibration", tmp_path / "short")
    assert short == "the calibration text fills 1 of the 3 windows of 16 tokens that are needed; choose a longer text, or self"
    target = ("--kv-budget", "0.5", "--out", tmp_path / "new.json", "--measurements")
    assert refused("select", model, *target, tmp_path / "new.json").endswith("--out and by --measurements; name two files")
    assert refused("select", model, *target, model / "m.json").endswith("which is only read; choose a place outside it")
    assert "no is not a folder; make it first" in refused("select", model, *target, tmp_path / "no" / "m.json")
    (tmp_path / "new.json").touch()
    (tmp_path / "m.json").touch()
    again = f"with --measurements {tmp_path}/m.json so that nothing is measured again"
    assert refused("select", model, *target, tmp_path / "m.json").endswith(again)
    assert "(max_position_embeddings)" in refused("select", model, "--target-ms", "5", "--context", "4096")
    assert refused("convert", model, "out") == "neither of --groups and --plan given; give one of them"
    assert refused("convert", model, "out", "--plan", tmp_path / "none").endswith("cannot be read: No such file or directory")
    (tmp_path / "bad").write_text("{")
    assert "bad is not JSON" in refused("export", model, "out", "--plan", tmp_path / "bad")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    assert refused("export", model, "out", "--plan", tmp_path / "bytes").endswith("bytes is not JSON: it is not UTF-8 text")


def test_ctrl_c_tells_what_it_keeps(headpool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.convert import replace_one

    divergences, calls = replace_one.divergences, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return divergences(*given)

    monkeypatch.setattr(replace_one, "divergences", interrupted)
    command = ("select", made / "model", "--kv-budget", "0.75", *SELECT, "--out", tmp_path / "plan.json")
    kept = tmp_path / "plan.measured.json"
    told = f"headpool: interrupted; {kept} keeps what was measured, the same command goes on from there\n"
    assert headpool(*command) == (130, "", told)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
