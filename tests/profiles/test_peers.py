"""Other runtimes beside headpool: the pipe protocol and the turns with a fake runtime, the comparison on made-up figures."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from exporter.engines.base import SessionInfo
from exporter.errors import EngineError
from profiles.bandwidth import BandwidthProbe
from profiles.measure import Plan, measure
from profiles.peers import __main__ as command
from profiles.peers import run as run_module
from profiles.peers import runtimes
from profiles.peers.comparison import rows_of, slopes_of, tables
from profiles.peers.models import make_checkpoint
from profiles.peers.process import ROOT, WorkerError, WorkerProcess
from profiles.peers.run import apart, in_turns, together
from profiles.peers.runner import Runner
from profiles.peers.runtimes import RUNTIMES, Runtime
from profiles.peers.session import PeerSession
from profiles.peers.worker import Worker
from profiles.reading import READ

HERE = str(Path(__file__).parent)
TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}


def fake_command(module: str = "fake_runtime") -> list[str]:
    code = f"import sys; sys.path.append({HERE!r}); from profiles.peers.worker import main; main({module!r})"
    return [sys.executable, "-c", code]


@pytest.fixture
def start(tmp_path, fakes):
    """Opens a fake runtime in a process, which notes what it is asked in tmp_path/asked."""
    opened = []

    def start(name: str = "fake", capacity: int = 64, batch: int = 1) -> PeerSession:
        worker = WorkerProcess(name, fake_command(), tmp_path / "log", threads=1)
        opened.append(worker)
        info = worker.ask("open", model=str(tmp_path / "asked"), batch=batch, capacity=capacity, threads=1, name=name)
        return PeerSession(worker, fakes.CONFIG, batch, capacity, SessionInfo(name, "CPU", info["versions"], info["options"]))

    yield start
    for worker in opened:
        worker.close()


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


def test_a_session_over_a_pipe(start, tmp_path):
    session = start()
    assert session.info.versions == {"fake": "1.0"}
    logits = session.prefill([np.array([7, 7, 9])])
    assert logits.shape == (1, 50)
    assert logits.dtype == np.float32
    assert (logits[0, 7], logits[0, 9]) == (2, 1)
    assert session.decode(np.array([9]))[0, 9] == 2
    session.rewind(2)
    assert session.decode(np.array([3]))[0, [3, 7, 9]].tolist() == [1, 2, 0]
    assert session.lengths.tolist() == [3]
    assert "a runtime that talks" in (tmp_path / "log").read_text()  # and not between the answers
    assert "its library, too" in (tmp_path / "log").read_text()


def test_a_batch_over_a_pipe(start, tmp_path):
    session = start(batch=3)
    logits = session.prefill([np.array([7, 7]), np.array([8, 7]), np.array([9, 9])])
    assert logits[:, [7, 8, 9]].tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 2]]
    assert session.decode(np.array([9, 8, 7]))[:, [7, 8, 9]].tolist() == [[2, 0, 1], [1, 2, 0], [1, 0, 2]]
    assert session.lengths.tolist() == [3, 3, 3]
    assert len(session.timed_steps(np.array([1, 2, 3]), settle=1, count=2)) == 2
    assert session.timed_prefill([np.array([1]), np.array([2]), np.array([3])]).keys() == {"prefill", "ttft"}
    assert session.decode(np.array([4, 5, 6]))[:, 1:7].tolist() == (np.eye(6)[:3] + np.eye(6)[3:]).tolist()


def test_steps_are_timed_there_and_leave_no_tokens(start, tmp_path):
    session = start()
    session.prefill([np.array([1, 2, 3])])
    seconds = session.timed_steps(np.array([5]), settle=3, count=2)
    assert len(seconds) == 2
    assert all(0 < second < 5 for second in seconds)
    assert asked(tmp_path) == ["fake 3", *(f"fake {n}" for n in range(4, 9)), "fake rewind 3"]
    assert session.lengths.tolist() == [3]
    found = session.timed_prefill([np.array([1, 2])])
    assert 0 < found["prefill"] <= found["ttft"]
    assert session.decode(np.array([5]))[0, [1, 2, 3, 5]].tolist() == [1, 1, 0, 1]


def test_only_the_runtime_is_in_a_sample():
    """Times of a clock that feeding moves by 1 and rewinding by 100."""
    now = [0.0]

    class Slow(Runner):
        def __init__(self, model, batch, capacity, threads):
            self.versions, self.options = {}, {}

        def feed(self, tokens):
            now[0] += 1
            return np.zeros((1, 4))

        def rewind(self, length):
            now[0] += 100

    worker = Worker(types.SimpleNamespace(Peer=Slow), clock=lambda: now[0])
    worker.answer({"do": "open", "model": "m", "batch": 1, "capacity": 9, "threads": 1})
    assert worker.answer({"do": "prefill", "tokens": [[1, 2]]}) == {"prefill": 1, "ttft": 1}
    assert worker.answer({"do": "steps", "tokens": [1], "settle": 4, "count": 3}) == {"seconds": [1, 1, 1]}


def test_a_runtime_that_forgets_at_a_cost_forgets_less_often():
    """Steps leave their tokens until there are more than its slack; whatever else is asked finds the sequence as it was."""
    done = []

    class Dear(Runner):
        slack = 0.1

        def __init__(self, model, batch, capacity, threads):
            self.versions, self.options = {}, {}

        def feed(self, tokens):
            done.append(tokens.shape[1])
            return np.zeros((1, 4))

        def rewind(self, length):
            done.append(f"to {length}")

    worker = Worker(types.SimpleNamespace(Peer=Dear))
    worker.answer({"do": "open", "model": "m", "batch": 1, "capacity": 99, "threads": 1})
    worker.answer({"do": "feed", "tokens": [[0] * 60]})
    steps = {"do": "steps", "tokens": [1], "settle": 2, "count": 1}
    for _ in range(3):
        worker.answer(dict(steps))
    assert done == [60, *[1] * 9, "to 60"]
    worker.answer(dict(steps))
    worker.answer({"do": "feed", "tokens": [[5]]})
    assert done[-5:] == [1, 1, 1, "to 60", 1]


def test_what_goes_wrong_there_is_said_here(start, tmp_path):
    session = start()
    with pytest.raises(EngineError, match=r"^fake: ValueError: not 14; what it printed: .*log$"):
        session.prefill([np.array([14])])
    assert session.prefill([np.array([1])])[0, 1] == 1  # it still answers
    session.reset()
    with pytest.raises(EngineError, match=r"^fake ended with status 3; what it printed: .*log$"):
        session.prefill([np.array([13])])
    with pytest.raises(EngineError, match=r"^gone does not start: /no/python: No such file"):
        WorkerProcess("gone", ["/no/python"], tmp_path / "log", 1)
    with pytest.raises(EngineError, match=r"^new: ModuleNotFoundError: No module named 'not_there'"):
        WorkerProcess("new", fake_command("not_there"), tmp_path / "log", 1)


def test_runtimes_take_turns(start, tmp_path, factory):
    """Forwards, then backwards; every turn settles first, and a worker that is not asked does nothing."""
    plan = Plan((4,), kinds=("decode",), samples=8, burst=2, settle=1, warmup=1)
    subjects = [
        (factory.subject(2, name), lambda batch, capacity, profile_to=None, name=name: start(name, capacity, batch))
        for name in ("a", "b")
    ]
    cells = measure(subjects, plan)
    assert [(cell.subject.pattern, cell.backend, len(cell.samples)) for cell in cells] == [("a", "a", 8), ("b", "b", 8)]
    steps = [line.split()[0] for line in asked(tmp_path) if "rewind" not in line]
    turn = 1 + 2
    assert "".join(steps) == "a" * 2 + "b" * 2 + ("a" * turn + "b" * turn + "b" * turn + "a" * turn) * 2


@pytest.fixture
def fake_peers(tmp_path, monkeypatch):
    """headpool and a fake runtime as all there is, a tiny config, and what the command is called with."""
    monkeypatch.setattr(WorkerProcess, "__init__", _with_fakes(WorkerProcess.__init__))
    fake = Runtime("fake", "with_fake", cache="static")
    gone = Runtime("gone", "with_gone", environment=".venv-peers-gone")
    own = next(runtime for runtime in RUNTIMES if runtime.name == "headpool grouped")
    for module in (runtimes, command):
        monkeypatch.setattr(module, "RUNTIMES", (own, fake, gone))
    monkeypatch.setattr(run_module, "BandwidthProbe", functools.partial(BandwidthProbe, array_bytes=8 << 20))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    options = ["--config", str(tmp_path / "config.json"), "--groups", "2", "--contexts", "8", "--weights", "fp32"]
    return [str(tmp_path / "out"), *options, "--samples", "8", "--prefill", "0", "--threads", "1"]


def _with_fakes(start):
    def started(self, name, command, log, threads):
        start(self, name, fake_command() if command[-1].endswith("with_fake") else command, log, threads)

    return started


def test_what_cannot_run_or_computes_something_else_is_left_out_by_name(fake_peers, tmp_path, capsys, monkeypatch):
    assert command.main(fake_peers) == 0
    out = tmp_path / "out"
    record = json.loads((out / "peers.json").read_text())
    rows = {what: [row for row in record["rows"] if row["what"] == what] for what in ("decode", "logits", "left out")}
    reasons = {row["runtime"]: row["reason"] for row in rows["left out"]}
    assert reasons.keys() == {"fake", "gone"}
    assert "fake computes something else with 2 KV heads: logits off by" in reasons["fake"]
    assert "gone does not start: " in reasons["gone"]
    assert not record["kept"]
    assert [(row["runtime"], row["context"]) for row in rows["decode"]] == [("headpool `grouped`", 8)]
    [logits] = [row for row in rows["logits"] if row["runtime"] == "headpool grouped"]
    assert 0 < logits["difference"] < 1e-4
    captured = capsys.readouterr()
    assert captured.out.strip().endswith((out / "peers.md").read_text().strip())
    assert "left out, fp32: fake computes something else" in captured.err

    monkeypatch.setattr(run_module, "measure", None)  # a second call finds all of it done
    assert command.main(fake_peers) == 0
    assert json.loads((out / "peers.json").read_text()) == record
    assert command.main([*fake_peers, "--samples", "16"]) == 2
    assert "fp32-g2.json was measured with other options" in capsys.readouterr().err


def test_one_that_ends_while_it_is_measured_costs_only_its_own_place(fake_peers, tmp_path, monkeypatch):
    """It is named and the rest measured without it; headpool's own failure is nobody else's."""
    own, fake, _ = command.RUNTIMES
    good = dataclasses.replace(fake, name="good")
    for module in (runtimes, command):
        monkeypatch.setattr(module, "RUNTIMES", (own, fake, good))
    monkeypatch.setattr(run_module.Agreement, "check", lambda *given: None)
    failing, asked_as = [fake.name], PeerSession.timed_steps

    def steps(self, *given):
        if self.worker.name in failing:
            raise WorkerError(f"{self.worker.name} ended with status -9", self.worker.name)
        return asked_as(self, *given)

    monkeypatch.setattr(PeerSession, "timed_steps", steps)
    assert command.main(fake_peers) == 0
    record = json.loads((tmp_path / "out" / "peers.json").read_text())
    measured = [row["runtime"] for row in record["rows"] if row["what"] == "decode"]
    assert sorted(measured) == ["good", "headpool `grouped`"]
    [missing] = [row for row in record["rows"] if row["what"] == "left out"]
    assert missing["runtime"] == "fake"
    assert missing["reason"] == "2 KV heads, 8 tokens, decode: fake ended with status -9"
    assert not record["kept"]
    failing[:] = [own.name]
    (tmp_path / "out" / "fp32-g2.json").unlink()
    assert command.main(fake_peers) == 2


def test_a_batch_of_equal_lengths(fake_peers, tmp_path, capsys, monkeypatch):
    """Every sequence is checked and all are measured, in a folder of models that are there; another config's are refused."""
    assert command.main([*fake_peers, "--batch", "3"]) == 0
    record = json.loads((tmp_path / "out" / "peers.json").read_text())
    [row] = [row for row in record["rows"] if row["what"] == "decode"]
    read, cell = record["run"]["cells"]
    assert row["batch"] == cell["batch"] == read["batch"] == 3
    assert read["subject"]["pattern"] == READ
    assert row["floor_ms"] == pytest.approx(np.median(read["samples"]) * 1e3)
    [logits] = [row for row in record["rows"] if row["what"] == "logits" and row["runtime"] == "headpool grouped"]
    assert logits["batch"] == 3
    assert 0 < logits["difference"] < 1e-4
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"intermediate_size": 64}))
    assert command.main(fake_peers) == 2
    assert "g2 holds a model of another config than" in capsys.readouterr().err


def test_mistakes(fake_peers, capsys):
    for more, text in (
        (["--runtimes", "vllm"], "vllm"),
        (["--weights", "int3"], "int3"),
        (["--groups", "3"], "3"),
        (["--batch", "0"], "batch 0 is not a whole number from 1"),
    ):
        assert command.main([*fake_peers, *more]) == 2
        assert text in capsys.readouterr().err


def test_gguf_holds_the_same_weights(tmp_path):
    """Read back by headpool's own reader of GGUF, which undoes the order of Q and K."""
    from exporter.checkpoint import open_source

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    make_checkpoint(tmp_path / "config.json", 2, tmp_path / "g2")
    folder, file = open_source(tmp_path / "g2" / "huggingface"), open_source(tmp_path / "g2" / "model.gguf")
    assert file.config.kv_heads == folder.config.kv_heads == (2, 2)
    assert file.config.rope == folder.config.rope
    assert file.weights.keys() == folder.weights.keys()
    for name, tensor in folder.weights.items():
        np.testing.assert_array_equal(file.weights[name].read().numpy(), tensor.read().numpy())


def made_up(factory):
    """Two runtimes at two contexts with 4 and 1 KV heads; the other one takes 1.5 times as long. Two parts."""
    parts = []
    for groups in (4, 1):
        cells = []
        for name, backend, times in (("fused", "onnxruntime", 1.0), ("gqa", "onnxruntime", 1.2), ("Other", "Other", 1.5)):
            what = factory.subject(groups, name)
            for context, ms in ((512, 20), (1512, 22)):
                time = times * ms * 1e-3
                cells.append(factory.cell(what, "decode", context, backend=backend, provider="CPU", samples=(time,) * 8))
            cells.append(factory.cell(what, "ttft", 2048, backend=backend, samples=(times * 3,) * 6))
        parts.append(factory.sweep(cells=tuple(cells)))
    return together(parts)


def test_comparison(factory):
    results = made_up(factory)
    assert len({(cell.subject.groups, cell.cohort) for cell in results.cells}) == 2
    assert len(results.bandwidth.samples) == 6
    rows = rows_of(results)
    other = next(row for row in rows if row["runtime"] == "Other" and row["context"] == 512)
    assert other["ms"] == pytest.approx(30)
    assert other["to_headpool"] == pytest.approx(1.5)
    assert (other["low"], other["high"]) == (pytest.approx(1.5), pytest.approx(1.5))
    slopes = {(row["runtime"], row["groups"]): row for row in slopes_of(rows)}
    assert slopes["headpool `fused`", 4]["ms"] == pytest.approx(2)
    kv = factory.subject(1).kv_bytes_per_token
    assert slopes["Other", 1]["floor_ms"] == pytest.approx(kv / 31e9 * 1e6)
    far = [{"runtime": "Other", "weights": "fp32", "groups": 4, "difference": 2.1e-6}]
    text = tables(rows, far, [{"runtime": "gone", "weights": "int4", "reason": "not here"}])
    lines = text.splitlines()
    assert lines[0].startswith("| fp32 weights, batch 1, G = 4 / 1 | 512 tokens, ms | × headpool's best | 1,512 tokens, ms |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert re.search(
        r"\| Other \| 30.0 / 30.0 \| 1.50 / 1.50 \| 33.0 / 33.0 \| 1.50 / 1.50 \| 3.00 / 3.00 \| 4,500 / 4,500", text
    )
    assert "| 2.1e-06 / – |" in text
    assert lines[-1] == "gone, int4: left out, not here"


def test_what_memory_does_not_hold_takes_turns_with_headpool_alone(factory):
    """Ratios are then within each of those runs."""

    class Opened:
        def __init__(self, name, own=False):
            self.runtime, self.subject = types.SimpleNamespace(own=own), factory.subject(4, name)

    openers = [Opened("fused", own=True), Opened("gqa", own=True), Opened("a"), Opened("b")]
    plan = Plan((512,), kinds=("decode",), memory=1 << 50)
    names = lambda plan: [[subject.pattern for subject, _ in turns] for turns in in_turns(openers, plan, 1000)]  # noqa: E731
    assert names(plan) == [["fused", "gqa", "a", "b"]]
    # Each takes twice its 500 MB of weights, and once those are read in turns with them.
    assert names(dataclasses.replace(plan, memory=4_000_000_000)) == [["fused", "gqa", "a"], ["fused", "gqa", "b"]]
    assert names(dataclasses.replace(plan, memory=3_500_000_000)) == [["fused", "a"], ["fused", "b"]]
    runs = []
    for ms, name in ((20, "a"), (40, "b")):  # a machine that is half as fast in the second run
        times = (("fused", "onnxruntime", ms), (name, name, 1.5 * ms))
        runs.append([factory.cell(factory.subject(4, n), backend=b, provider="CPU", samples=(t,) * 8) for n, b, t in times])
    rows = rows_of(factory.sweep(cells=apart(runs)))
    assert [(row["runtime"], row["to_headpool"]) for row in rows] == [
        ("headpool `fused`", 1), ("a", pytest.approx(1.5)), ("headpool `fused`", 1), ("b", pytest.approx(1.5))
    ]  # fmt: skip


def test_the_script_pins_what_it_installs():
    text = (ROOT / "scripts" / "peers").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"(\w+=\S+ )*peer \w", line)]
    names = {re.search(r"\bpeer (\S+)", line)[1] for line in lines}
    assert {f".venv-peers-{name}" for name in names} == {runtime.environment for runtime in RUNTIMES if not runtime.own}
    for line in lines:
        words = re.sub(r"#.*", "", line).split()
        words = [word for word in words[words.index("peer") + 2 :] if not word.startswith("--")]
        assert words
        for word in words:
            [pin] = Requirement(word).specifier
            assert pin.operator == "==", word
