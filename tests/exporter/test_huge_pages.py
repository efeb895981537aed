"""Memory on huge pages: what is in it, that sessions share it, and that it goes when nobody uses it any more."""

from __future__ import annotations

import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from exporter.checkpoint import Checkpoint
from exporter.engines import huge_pages, open_session
from exporter.errors import EngineError
from exporter.export import ExportOptions, export


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 7), (huge_pages.PAGE // 4,), (3, 1 << 20), (1, 2, 300_001)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_zeros(shape: tuple[int, ...], dtype: type) -> None:
    array = huge_pages.zeros(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.c_contiguous
    assert not array.any()
    if array.nbytes >= huge_pages.PAGE:
        assert array.ctypes.data % huge_pages.PAGE == 0
    array[...] = 7
    assert (array == 7).all()


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_small_ones_lie_together_and_apart(dtype: type) -> None:
    """In one piece of memory, each from the beginning of a cache line on; a large one has pages of its own."""
    shapes = [(2, 3, 7), (0, 3), (1, 5), (1, 4, 700, 64), (3, 1 << 20)]
    arrays = huge_pages.zeros_together(shapes, dtype)
    assert [(array.shape, array.dtype) for array in arrays] == [(shape, dtype) for shape in shapes]
    assert not any(array.any() for array in arrays)
    for number, array in enumerate(arrays):
        array[...] = number + 1
    assert all((array == number + 1).all() for number, array in enumerate(arrays))
    first, _, *others, large = arrays
    assert all(array.base is first.base and (array.ctypes.data - first.ctypes.data) % huge_pages.LINE == 0 for array in others)
    assert large.base is not first.base
    assert large.ctypes.data % huge_pages.PAGE == 0


def held(path: Path) -> list[object]:
    return [file for (name, *_), file in huge_pages._files.items() if name == path.resolve()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(3_000_001))
    return path


def test_a_file_is_read_once_for_all_that_hold_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(huge_pages.read, [file, file, tmp_path / "link", file])
    assert all(other is first for other in others)
    assert first.bytes.tobytes() == file.read_bytes()
    gone = weakref.ref(first)
    del first, others
    gc.collect()
    assert gone() is None
    assert held(file) == []


def test_a_file_that_changed_is_read_again(file: Path) -> None:
    old = huge_pages.read(file)
    before = old.bytes.tobytes()
    file.write_bytes(b"other")
    assert huge_pages.read(file).bytes.tobytes() == b"other"
    file.write_bytes(b"third")
    os.utime(file, ns=(1, 1))
    assert huge_pages.read(file).bytes.tobytes() == b"third"
    assert old.bytes.tobytes() == before


def test_a_file_that_is_cut_while_it_is_read(file: Path) -> None:
    with pytest.raises(OSError, match=f"ends after {file.stat().st_size} of {file.stat().st_size + 1} bytes"):
        huge_pages._File(file, file.stat().st_size + 1)


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert huge_pages.read(tmp_path / "empty").bytes.size == 0
    with pytest.raises(FileNotFoundError):
        huge_pages.read(tmp_path / "none")


@pytest.mark.parametrize("storage", ["copy", "link"])  # linked weights lie where the checkpoint has them, at any offset
def test_initializers_are_the_weights(storage, checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(patterns=("fused",), storage=storage))
    values, files = huge_pages.initializers(bundle.graph_path(bundle.variants[0]))
    expected = {name: array for path in sorted(bundle.path.glob("*.safetensors")) for name, array in load_file(path).items()}
    assert len(values) > 15
    for name, value in values.items():
        np.testing.assert_array_equal(value.numpy(), expected[name])
    assert 0 < len(files) <= len(list(bundle.path.glob("*.safetensors")))


def test_weights_that_are_damaged_or_gone(checkpoint: Checkpoint, tmp_path: Path, capfd) -> None:
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(patterns=("fused",)))
    (weights,) = bundle.path.glob("*.safetensors")
    content = weights.read_bytes()
    values, files = huge_pages.initializers(bundle.graph_path(bundle.variants[0]))
    del values, files
    weights.write_bytes(content[:-3])
    with pytest.raises(
        ValueError, match=rf"of {weights.name}, which has {len(content) - 3:,}: one of the two was cut short; export the bundle"
    ):
        huge_pages.initializers(bundle.graph_path(bundle.variants[0]))
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        huge_pages.initializers(bundle.graph_path(bundle.variants[0]))


def test_no_memory_for_the_weights(checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    import harness

    harness.operators()
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(patterns=("fused",)))

    def none(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(huge_pages, "zeros", none)
    with pytest.raises(EngineError, match=r"the weights of .*model\.onnx cannot be read: not enough memory"):
        open_session(bundle)
