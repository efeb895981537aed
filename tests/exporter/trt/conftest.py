"""A tiny decoder's graphs and TensorRT for RTX, which parses and builds on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

from exporter.bundle import Bundle
from exporter.engines.tensorrt.api import Api, load


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
