"""A tiny decoder's graphs, a tiny T5's, and TensorRT for RTX, which parses and builds on a machine without a GPU."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import t5
import tiny

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.engines.tensorrt.api import Api, load
from exporter.export import ExportOptions, export


@pytest.fixture(scope="session")
def api() -> Api:
    return load("tensorrt-rtx")


@pytest.fixture
def bare(monkeypatch) -> None:
    """A machine without a GPU and without full TensorRT, whatever this one has."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture(scope="session")
def decoder() -> tiny.Decoder:
    return tiny.decoder()


@pytest.fixture
def attention(decoder, tmp_path: Path) -> Bundle:
    """One variant, "v": pattern attention, fp16, 2 layers of 2 and 3 KV heads under 6 query heads of 16."""
    return tiny.bundle(tmp_path, decoder, "attention", dtype="fp16")


@pytest.fixture
def grouped(decoder, tmp_path: Path) -> Bundle:
    return tiny.bundle(tmp_path, decoder, "grouped", dtype="fp16")


@pytest.fixture(scope="session")
def t5_exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5.1.1-like pair: 2 encoder and 3 decoder layers, 2 KV heads under 6 query heads of 16; fp32. Only to be read."""
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = open_checkpoint(t5.save("t5-wide", folder))
    export(checkpoint, folder / "bundle", ExportOptions((2,), patterns=("attention", "grouped"), cache="static"))
    return folder / "bundle"


@pytest.fixture
def pair(t5_exported: Path, tmp_path: Path) -> Bundle:
    """The same, to build into: variants g2.attention and g2.grouped."""
    shutil.copytree(t5_exported, tmp_path / "pair")
    return Bundle.open(tmp_path / "pair")
