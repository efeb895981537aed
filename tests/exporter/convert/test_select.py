"""Selection: the front against an integer programme, losses against whole models, runs that go on, plans that do not fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import hf
import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from exporter.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from exporter.config import ModelConfig
from exporter.convert import calibration as calibrating
from exporter.convert import convert_weights, replace_one, select
from exporter.convert.knapsack import pareto_front
from exporter.convert.methods import held
from exporter.convert.plan import KVPlan
from exporter.errors import UserError
from exporter.models.decoder import Decoder


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "WINDOWS", 4)
    monkeypatch.setattr(calibrating, "WINDOW", 24)


def selection(checkpoint: Checkpoint, store: Path, **how: Any) -> select.Selection:
    chosen = select.How(**{"calibration": "random", **how})
    return select.Selection(checkpoint, chosen, store, lambda what, done, total: None)


def logits(checkpoint: Checkpoint, tokens: np.ndarray) -> torch.Tensor:
    model = Decoder.from_weights(checkpoint.config, checkpoint.weights)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    found = model(torch.from_numpy(tokens), positions, model.empty_cache(*tokens.shape))[0]
    return found.double().log_softmax(-1)


def divergence(checkpoint: Checkpoint, kv_heads: Any, windows: np.ndarray, **how: Any) -> float:
    config, weights = convert_weights(checkpoint.config, checkpoint.weights, kv_heads, **how)
    ours = logits(checkpoint, windows)
    theirs = logits(dataclasses.replace(checkpoint, config=config, weights=weights), windows)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_that_of_an_integer_programme(seed: int) -> None:
    """scipy's milp finds the same least loss for every budget, and every choice adds up to what its point says."""
    rng = np.random.default_rng(seed)
    layers = [[(int(rng.integers(1, 12)), float(rng.random())) for _ in range(rng.integers(1, 5))] for _ in range(7)]
    front = pareto_front(layers)
    options = [(layer, *option) for layer, choices in enumerate(layers) for option in choices]
    costs, losses = (np.array([option[index] for option in options], float) for index in (1, 2))
    one_a_layer = np.array([[float(option[0] == layer) for option in options] for layer in range(len(layers))])
    for one, after in itertools.pairwise(front):
        assert one.cost < after.cost
        assert one.loss > after.loss
    for point in front:
        taken = [layers[layer][choice] for layer, choice in enumerate(point.choices)]
        assert sum(cost for cost, _ in taken) == point.cost
        assert sum(loss for _, loss in taken) == pytest.approx(point.loss)
    for budget in range(front[0].cost, front[-1].cost + 1):
        limits = [LinearConstraint(one_a_layer, 1, 1), LinearConstraint(costs[None], ub=budget)]
        best = milp(losses, constraints=limits, integrality=np.ones(len(options)), bounds=Bounds(0, 1))
        assert best.success
        assert select.dearest(front, budget).loss == pytest.approx(best.fun, abs=1e-9)


@pytest.mark.parametrize(("method", "name"), [("mean", "llama"), ("optimal", "llama-tied-biased"), ("optimal", "qwen3"),
                                              ("procrustes", "gemma")])  # fmt: skip
def test_losses_are_those_of_whole_models(method: Any, name: str, tmp_path: Path) -> None:
    """Each layer replaced in the whole torch model, and its KL on the windows that were not converted on.

    Logits are float32 in both, and a KL is a small difference of them: hence the 0.2 %.
    """
    source = open_checkpoint(hf.save(name, tmp_path))
    chosen = selection(source, tmp_path / "store.json", method=method)
    chosen.measure()
    windows = np.array(chosen.measured.tokens)
    assert windows.shape == (4 + replace_one.MEASURED, 24)
    fitted, kept = windows[: -replace_one.MEASURED], windows[-replace_one.MEASURED :]
    how = {"method": method, **({} if method == "mean" else {"tokens": fitted})}
    before = source.config.kv_heads
    found = chosen.measured.by_layer()
    assert set(found) == set(range(source.config.num_layers))
    for layer, losses in found.items():
        assert set(losses) == set(chosen.counts[layer][1:])
        for count, loss in losses.items():
            kv_heads = (*before[:layer], count, *before[layer + 1 :])
            assert loss == pytest.approx(divergence(source, kv_heads, kept, **how), rel=2e-3, abs=1e-5)
    front = chosen.front(select.kv_costs(source.config))
    assert chosen.kv_heads_of(front[-1]) == before
    assert front[-1].loss == 0
    assert chosen.loss_of(front[0]) == pytest.approx(divergence(source, chosen.kv_heads_of(front[0]), kept, **how), rel=2e-3)


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(hf.save("llama", tmp_path))
    whole = selection(source, tmp_path / "whole.json", method="mean-renorm")
    whole.measure()
    store = tmp_path / "store.json"
    first = selection(source, store, method="mean-renorm")
    save = select.Selection._save

    def interrupted(self: select.Selection) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(select.Selection, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            first.measure()
    assert [row[0] for row in json.loads(store.read_text())["losses"]] == [0]
    tried: list[int] = []
    converted = replace_one.ReplaceOne._converted

    def counted(self: replace_one.ReplaceOne, walk: Any, layer: Any, index: int, *rest: Any) -> Any:
        tried.append(index)
        return converted(self, walk, layer, index, *rest)

    monkeypatch.setattr(replace_one.ReplaceOne, "_converted", counted)
    again = selection(source, store, method="mean-renorm")
    again.measure()
    assert tried == [1]
    assert again.measured == whole.measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "store.json", "whole.json"]
    with pytest.raises(UserError, match=r"holds measurements of llama by method mean-renorm.*choose another --measurements"):
        selection(source, store, method="mean").measure()
    store.write_text("[")
    with pytest.raises(UserError, match=r"measurements .*store\.json is not JSON"):
        selection(source, store, method="mean-renorm").measure()


def test_a_bound_on_the_loss_holds_for_the_whole_plan(tmp_path: Path) -> None:
    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    chosen = selection(source, tmp_path / "store.json")
    chosen.measure()
    front = chosen.front(select.kv_costs(source.config))
    bound = (front[1].loss + front[2].loss) / 2
    point, loss = chosen.within_loss(front, bound)
    assert loss <= bound
    assert loss == chosen.loss_of(point)
    assert chosen.within_loss(front, 1e-9) == (front[-1], 0.0)
    chosen.loss_of = lambda point: 3 * point.loss  # type: ignore[method-assign]  # losses that add up badly
    point, loss = chosen.within_loss(front, bound)
    assert 3 * point.loss == loss <= bound
    assert all(3 * other.loss > bound for other in front if other.cost < point.cost)
    chosen.loss_of = lambda point: 0.4 * point.loss  # type: ignore[method-assign]
    point, loss = chosen.within_loss(front, bound)
    assert 0.4 * point.loss == loss <= bound
    assert all(0.4 * other.loss > bound for other in front if other.cost < point.cost)
    chosen.loss_of = lambda point: 0.0 if point is front[-1] else bound * 2  # type: ignore[method-assign]
    assert chosen.within_loss(front, bound) == (front[-1], 0.0)


def test_measurements_of_another_text_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    store, text = tmp_path / "store.json", tmp_path / "text.txt"
    hf.add_tokenizer(hf.save("llama", tmp_path))
    source = open_checkpoint(tmp_path / "llama")
    text.write_text("some text " * 200)
    how = select.How("mean", calibration=str(text))
    select.Selection(source, how, store, lambda *_: None).measure()
    written = json.loads(store.read_text())
    text.write_text("another text " * 200)
    twin = dataclasses.replace(source, files=(text,))
    with pytest.raises(UserError, match=r"holds measurements of other weights, llama's; choose another --measurements"):
        select.Selection(twin, how, store, lambda *_: None).measure()
    with pytest.raises(UserError, match=r"holds measurements on another text than \S*text.txt holds now; choose another"):
        select.Selection(source, how, store, lambda *_: None).measure()
    text.write_text("some text " * 200)
    ragged = [written["tokens"][0][1:], *written["tokens"][1:]]
    foreign = [[source.config.vocab_size, *written["tokens"][0][1:]], *written["tokens"][1:]]
    for changes in (
        {"tokens": []},
        {"tokens": ragged},
        {"tokens": foreign},
        {"losses": [[2, 1, 0.1]]},
        {"losses": [[0, 7, 0.1]]},
    ):
        store.write_text(json.dumps(written | changes))
        with pytest.raises(UserError, match=r"is damaged, its tokens or layers are not llama's; remove it to begin anew"):
            select.Selection(source, how, store, lambda *_: None).measure()


def test_latency_is_shared_out_by_layer() -> None:
    config = dataclasses.replace(mha(), kv_heads=(6, 2))
    costs = select.latency_costs(config, {6: 0.012, 3: 0.008, 2: 0.006, 1: 0.004})
    assert costs == [{6: 60000, 3: 40000, 2: 30000, 1: 20000}, {2: 30000, 1: 20000}]
    select.check_reachable(costs, 40000, 1e3 / select.TICKS, "--target-ms", "ms")
    with pytest.raises(UserError, match=r"^--target-ms 3\.9 cannot be met: the least is 4 ms; choose that or more$"):
        select.check_reachable(costs, 39000, 1e3 / select.TICKS, "--target-ms", "ms")


def mha() -> ModelConfig:
    return ModelConfig(32, 48, 2, 6, (6, 6), 8, 32, 64)


def test_losses_that_are_no_numbers_stop_the_measurement(tmp_path: Path) -> None:
    source = open_checkpoint(hf.save("llama", tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    broken = {**source.weights, name: held(name, source.weights[name].read() * 1e38)}
    chosen = selection(dataclasses.replace(source, weights=broken), tmp_path / "store.json", method="mean")
    with pytest.raises(UserError, match="layer 0 with 1 KV heads gives logits that are no numbers; its weights are damaged"):
        chosen.measure()


def test_plans_that_are_none(tmp_path: Path) -> None:
    plan = KVPlan("llama", 6, (2, 2), (2, 1), "mean", "contiguous", None, 0, {"kv_budget": 0.8}, {"kv_share": 0.75})
    plan.save(tmp_path / "plan.json")
    assert KVPlan.load(tmp_path / "plan.json") == plan
    written = json.loads((tmp_path / "plan.json").read_text())

    def refused(**changes: Any) -> str:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({key: value for key, value in {**written, **changes}.items() if value is not ...}))
        with pytest.raises(UserError) as caught:
            KVPlan.load(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(path))
        return str(caught.value).removeprefix(f"{path}: ")

    assert refused(kv_heads=[2, 4]) == "plan, layer 1: 4 KV heads do not divide 6 query heads; choose from 6, 3, 2, 1"
    assert refused(kv_heads=[2]) == "plan has KV heads for 1 of 2 layers; select it again"
    assert refused(schema=7) == "plan has schema 7, this headpool reads schema 1; select it again"
    assert refused(heads=...).endswith("changed.json lacks heads")
    assert "changed.json.method" in refused(method="best")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        KVPlan.load(tmp_path / "absent.json")
    config = mha()
    with pytest.raises(
        UserError,
        match=r"^p is a plan for llama, 2 layers of 6 query and 2 KV heads; mine has 2 layers of 6 query and 6 KV heads; make",
    ):
        plan.check(config, "mine", "p")


def test_checkpoints_with_kv_heads_by_layer(tmp_path: Path) -> None:
    """Written and read again; transformers does not take it for a model with one number."""
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(hf.save("llama-mha-gelu", tmp_path))
    config, weights = convert_weights(source.config, source.weights, (3, 2))
    made = dataclasses.replace(source, config=config, weights=weights)
    write_checkpoint(made, tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert again.config == config
    tokens = np.arange(20)[None]
    torch.testing.assert_close(
        logits(again, tokens), logits(dataclasses.replace(source, config=config, weights=weights), tokens)
    )
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config, weights = convert_weights(again.config, again.weights, 1)
    write_checkpoint(dataclasses.replace(again, config=config, weights=weights), tmp_path / "one")
    assert "num_key_value_heads_per_layer" not in json.loads((tmp_path / "one" / "config.json").read_text())
    hf_json = json.loads((tmp_path / "out" / "config.json").read_text())
    for wrong in ([3], [3, "2"], 3):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**hf_json, "num_key_value_heads_per_layer": wrong}))
        with pytest.raises(UserError, match="is not a list of 2 whole numbers, one a layer"):
            open_checkpoint(tmp_path / "out")
