"""Text, JSON lines and datasets → tokens → windows."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import UserError
from exporter.tokenizer import Tokenizer
from exporter.uptrain import sources
from exporter.uptrain.sources import pieces
from exporter.uptrain.tokens import Windows, write_tokens

STORY = "one line\ntwo lines\r\n\nthe end"


def read(*paths: str | Path, field: str = "text") -> list[tuple[str, bool]]:
    return [piece for piece in pieces(map(str, paths), field) if piece[0] or piece[1]]


def test_a_text_is_one_document_in_pieces_of_whole_lines(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.md"
    path.write_text("äb\n" * 10 + "end", "utf-8")
    monkeypatch.setattr(sources, "PIECE", 8)
    found = read(path)
    assert "".join(text for text, _ in found) == path.read_text("utf-8")
    assert len(found) > 3
    assert all(text.endswith("\n") for text, _ in found[:-2])
    assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]


def test_json_lines(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": STORY, "n": 1}), "", json.dumps({"text": "b"})]), "utf-8")
    assert read(path) == [(STORY, True), ("b", True)]
    with pytest.raises(UserError, match=r"line 1 has no text in the field 'body'; it has text, n$"):
        read(path, field="body")
    path.write_text('{"text": "a"}\n{"text": 3}\n', "utf-8")
    with pytest.raises(UserError, match=r"line 2 has no text in the field 'text'; it has text$"):
        read(path)
    path.write_text('{"text": "a"}\n[1]\n', "utf-8")
    with pytest.raises(UserError, match=r"line 2 has no text in the field 'text', nor any: it is no object$"):
        read(path)
    path.write_text('{"text": "a"}\n{"text": \n', "utf-8")
    with pytest.raises(UserError, match=r"line 2 is not JSON: Expecting value$"):
        read(path)
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=r"is not UTF-8 text$"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=rf"data '{tmp_path}' is not a file; .* or hf:{tmp_path} for a folder of datasets'"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"data 'nowhere.txt' is not a file; give a text file, a .jsonl file, or hf:NAME"):
        read("nowhere.txt")


def test_what_datasets_is_asked_for(tmp_path, monkeypatch) -> None:
    asked: list[tuple] = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        if arguments[0] == "broken":
            raise ConnectionError("no\nnetwork")
        return [{"text": "row"}]

    stub = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda name: {"test": [{"text": name}]})
    monkeypatch.setitem(sys.modules, "datasets", stub)  # type: ignore[arg-type]
    (tmp_path / "rows.parquet").touch()
    assert read("hf:org/name:config:test", "hf:plain", tmp_path / "rows.parquet") == [("row", True)] * 3
    streamed = {"split": "train", "streaming": True}
    assert asked == [
        ("org/name", "config", {**streamed, "split": "test"}),
        ("plain", None, streamed),
        ("parquet", {**streamed, "data_files": str(tmp_path / "rows.parquet")}),
    ]
    (tmp_path / "dataset_dict.json").touch()
    assert read(f"hf:{tmp_path}::test") == [(str(tmp_path), True)]
    with pytest.raises(UserError, match=r"data hf:broken cannot be loaded: ConnectionError: no network$"):
        read("hf:broken")
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data hf:plain needs the datasets package: pip install 'headpool\[uptrain\]'$"):
        read("hf:plain")


def test_the_hub_is_quiet_while_it_is_asked(monkeypatch) -> None:
    logger, retries = logging.getLogger("huggingface_hub"), logging.getLogger("huggingface_hub.utils._http")
    told: list[bool] = []

    def load_dataset(*_, **__):
        told.append(retries.isEnabledFor(logging.ERROR))
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    before = logger.level
    with pytest.raises(UserError, match=r"data hf:no/such cannot be loaded: ConnectionError: no network$"):
        read("hf:no/such")
    assert told == [False]
    assert logger.level == before


def test_datasets_itself(tmp_path, monkeypatch) -> None:
    import datasets
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    parquet = tmp_path / "folder" / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", STORY]}), parquet)
    (tmp_path / "rows.csv").write_text("body\na\nb\n", "utf-8")
    datasets.load_dataset("parquet", data_files=str(parquet), split="train").save_to_disk(tmp_path / "saved")
    for source in (f"hf:{tmp_path / 'folder'}", parquet, f"hf:{tmp_path / 'saved'}"):
        assert read(source, field="body") == [("a", True), (STORY, True)]
    assert read(tmp_path / "rows.csv", field="body") == [("a", True), ("b", True)]
    with pytest.raises(UserError, match=r"row 1 has no text in the field 'text'; it has body$"):
        read(f"hf:{tmp_path / 'saved'}")


def test_tokens_are_the_tokenizers_with_an_end_behind_each_document(saved, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))
    documents = [f"doc {number} is here." for number in range(150)]
    expected = [token for text in documents for token in [*theirs(text, add_special_tokens=False).input_ids, 2]]
    seen: list[int] = []
    tokenizer = Tokenizer.open(saved)
    given = [(text, True) for text in documents]
    count = write_tokens(tmp_path / "all", given, tokenizer, 67, 2, 10**6, seen.append)
    assert np.fromfile(tmp_path / "all", "<u4").tolist() == expected
    assert (count, seen[-1]) == (len(expected), len(expected))
    assert write_tokens(tmp_path / "cut", given, tokenizer, 67, 2, 37, seen.append) == 37
    assert np.fromfile(tmp_path / "cut", "<u4").tolist() == expected[:37]
    write_tokens(tmp_path / "open", [("ab", False), ("c", True)], tokenizer, 67, None, 99, seen.append)
    assert np.fromfile(tmp_path / "open", "<u4").tolist() == theirs("abc", add_special_tokens=False).input_ids
    with pytest.raises(UserError, match=r"makes token 59, the model's vocabulary ends at 49$"):
        write_tokens(tmp_path / "small", [("z4", True)], tokenizer, 50, 2, 99, seen.append)


def test_windows(tmp_path) -> None:
    """Each window once a pass, in another order each pass; the held-out ones never."""
    np.arange(101, dtype="<u4").tofile(tmp_path / "tokens")
    windows = Windows.open(tmp_path / "tokens", 10, 3, seed=4)
    assert windows.count == 7
    assert windows.held().tolist() == [list(range(start, start + 11)) for start in (0, 10, 20)]
    rows = np.concatenate([windows.batch(step, 5) for step in range(14)])
    assert (rows == rows[:, :1] + np.arange(11)).all()
    passes = (rows[:, 0] // 10).reshape(10, 7)
    assert all(sorted(one) == [3, 4, 5, 6, 7, 8, 9] for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) == 10
    again = Windows.open(tmp_path / "tokens", 10, 3, seed=4)
    assert (again.batch(9, 5) == rows[45:50]).all()  # the same without those before
    assert (Windows.open(tmp_path / "tokens", 10, 3, seed=5).batch(0, 5) != rows[:5]).any()
    assert (windows.batch(0, 30)[:, 0] // 10).tolist() == passes.reshape(-1)[:30].tolist()  # longer than four passes
    assert Windows.open(tmp_path / "tokens", 10, 9, seed=4).count == 1
    with pytest.raises(UserError) as refusal:
        Windows.open(tmp_path / "tokens", 10, 10, seed=4)
    assert str(refusal.value) == (
        "the data has 101 tokens, at least 111 are needed: 10 held-out windows and one to train on, of 10 tokens each; give "
        "more text, a shorter window or fewer held out"
    )
