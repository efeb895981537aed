"""Safetensors against the safetensors library: what we write it reads, what we accept it accepts, what it refuses we refuse."""

from __future__ import annotations

import errno
import hashlib
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from exporter.checkpoint import check_finite, scan, write_safetensors
from exporter.checkpoint.safetensors_io import read_header
from exporter.errors import CheckpointError, UserError
from exporter.weights import BLOCK_BYTES, ComputedTensor, FileTensor

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def lazy(**tensors):
    return {
        name: ComputedTensor(name, value.dtype, tuple(value.shape), lambda value=value: value)
        for name, value in tensors.items()
    }


def file_tensors(path):
    return {name: FileTensor(name, TORCH[e.dtype], e.shape, path, e.offset) for name, e in read_header(path).items()}


@pytest.fixture
def some():
    generator = torch.Generator().manual_seed(1)
    return {
        "half": torch.randn(3, 5, generator=generator).half(),
        "wide": torch.randn(7, 3, generator=generator),
        "é": torch.randn(9, generator=generator).bfloat16(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }


def test_library_reads_what_we_write(some, tmp_path):
    path = tmp_path / "a.safetensors"
    places = write_safetensors(path, lazy(**some), metadata={"format": "pt"})
    loaded = load_file(path)
    assert set(loaded) == set(some)
    raw = path.read_bytes()
    for name, value in some.items():
        assert torch.equal(loaded[name], value)
        offset, nbytes = places[name]
        assert raw[offset : offset + nbytes] == value.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert offset % value.element_size() == 0
    assert min(offset for offset, _ in places.values()) == 4096
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(tmp_path.iterdir()) == [path]


def test_we_read_what_the_library_writes(some, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(some, path)
    for name, tensor in file_tensors(path).items():
        assert torch.equal(tensor.read(), some[name])


def test_cast_while_writing(some, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, lazy(**some), torch.float16)
    for name, value in load_file(path).items():
        assert torch.equal(value, some[name].half())


def test_large_tensors_are_streamed_in_blocks(tmp_path):
    value = torch.arange(BLOCK_BYTES // 2 + 77, dtype=torch.int32).view(torch.float32).abs().clamp(max=1.0).reshape(1, -1)
    value[0, -1] = 3.5
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(first, lazy(x=value))
    tensor = file_tensors(first)["x"]
    assert max(block.nbytes for block in tensor.blocks()) == BLOCK_BYTES
    assert len(list(tensor.blocks())) == 3
    write_safetensors(second, {"x": tensor}, torch.bfloat16)
    assert torch.equal(load_file(second)["x"], value.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_values_are_refused_by_name(bad, dtype, tmp_path):
    value = torch.ones(10, 10, dtype=dtype)
    value[7, 3] = bad
    tensors = lazy(fine=torch.ones(3), layer=value)
    text = "tensor 'layer' holds NaN or infinite values; the checkpoint is damaged or its training diverged"
    with pytest.raises(CheckpointError) as error:
        write_safetensors(tmp_path / "a", tensors)
    assert str(error.value) == text
    with pytest.raises(CheckpointError) as error:
        check_finite(tensors["layer"])
    assert str(error.value) == text
    assert not list(tmp_path.iterdir())


def test_large_finite_values_pass_though_their_sum_overflows(tmp_path):
    for dtype in TORCH.values():
        check_finite(lazy(x=torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype))["x"])


def test_a_cast_that_overflows_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError) as error:
        write_safetensors(tmp_path / "a", lazy(big=torch.tensor([1.0, 70000.0])), torch.float16)
    assert str(error.value) == "tensor 'big' has values beyond the range of torch.float16; choose bf16 or fp32"
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(UserError) as error:
        write_safetensors(path, lazy(x=torch.ones(1)))
    assert str(error.value) == f"{path} exists; choose another name or remove it"
    assert path.read_text() == "mine"
    with pytest.raises(UserError) as error:
        write_safetensors(tmp_path / "no" / "a", lazy(x=torch.ones(1)))
    why = f"{tmp_path}/no is not a folder; make it first, or choose another place"
    assert str(error.value) == f"{tmp_path}/no/a cannot be written: {why}"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_fails(failure, tmp_path):
    def compute():
        raise failure

    tensors = {**lazy(a=torch.ones(4)), "b": ComputedTensor("b", torch.float32, (4,), compute)}
    with pytest.raises((UserError, KeyboardInterrupt)) as error:
        write_safetensors(tmp_path / "out", tensors)
    if isinstance(failure, OSError):
        assert str(error.value) == f"{tmp_path}/out cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())


def test_scan_is_the_sha256_of_the_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 3_000_001)
    two.write_bytes(b"y" * 5)
    assert scan([one]) == hashlib.sha256(one.read_bytes()).hexdigest()
    assert scan([one, two]) == hashlib.sha256(one.read_bytes() + two.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError) as error:
        scan([tmp_path / "three"])
    assert str(error.value) == f"{tmp_path}/three cannot be read: No such file or directory"


def item(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def encode(header, data=b"\0" * 8, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


BROKEN = {
    "empty": (b"", "it has 0 bytes, too few for a header"),
    "short": (b"\x10\0\0\0\0\0\0\0{}", "its header should be 16 bytes, the file has 10"),
    "huge header": (encode({"a": item()}, length=2**63), f"its header should be {2**63} bytes, the file has 77"),
    "not JSON": (
        encode(b"{nope}"),
        "its header is not JSON: Expecting property name enclosed in double quotes: line 1 column 2",
    ),
    "a list": (encode(b"[1]"), "its header is not a JSON object"),
    "spaces first": (encode(b" {}", b""), "its header is not a JSON object"),
    "deep": (encode(b'{"a":' * 100_000), "its header is not JSON: maximum recursion depth exceeded"),
    "twice": (encode(b'{"a":1,"a":1}'), "its header is not JSON: key 'a' stands twice"),
    "metadata": (encode({"__metadata__": {"a": 1}}, b""), "its __metadata__ is not a map of strings"),
    "no shape": (encode({"a": {"dtype": "F32"}}), "tensor 'a' lacks dtype, shape or data_offsets"),
    "more keys": (encode({"a": item(more=1)}), "tensor 'a' has unknown keys"),
    "dtype": (encode({"a": item("F31")}), "tensor 'a' has dtype 'F31', which headpool does not know"),
    "negative": (encode({"a": item(shape=(-2,))}), "tensor 'a' has a shape or offsets that are not whole numbers ≥ 0"),
    "float": (encode({"a": item(shape=(2.0,))}), "tensor 'a' has a shape or offsets that are not whole numbers ≥ 0"),
    "bool": (encode({"a": item(shape=(2, True))}), "tensor 'a' has a shape or offsets that are not whole numbers ≥ 0"),
    "size": (encode({"a": item(shape=(3,))}), "tensor 'a' of F32 [3] needs 12 bytes, its offsets hold 8"),
    "reversed": (encode({"a": item(offsets=(8, 0))}), "tensor 'a' of F32 [2] needs 8 bytes, its offsets hold -8"),
    "hole": (
        encode({"a": item(offsets=(4, 12))}, b"\0" * 12),
        "tensor 'a' starts at byte 74, not at 70 where the one before it ends",
    ),
    "overlap": (
        encode({"a": item(), "b": item(offsets=(4, 12))}, b"\0" * 12),
        "tensor 'b' starts at byte 135, not at 139 where the one before it ends",
    ),
    "truncated": (encode({"a": item()}, b"\0" * 7), "its tensors end at byte 77, the file has 76"),
    "trailing": (encode({"a": item()}, b"\0" * 9), "its tensors end at byte 77, the file has 78"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path):
    data, why = BROKEN[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path} is not a whole safetensors file: {why}")
    assert str(error.value).endswith("; download it again")
    assert "\n" not in str(error.value)


def agree(path):
    """Either we refuse with one line, or the library opens the file too and reads the same values."""
    try:
        tensors = file_tensors(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  it need not be refused
        return
    except KeyError:  # a dtype that is no weight
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            bits = torch.int32 if tensor.dtype == torch.float32 else torch.int16
            assert torch.equal(tensor.read().view(bits), file.get_tensor(name).view(bits))


@FUZZ
@given(cut=st.integers(0, 250), flips=st.lists(st.tuples(st.integers(0, 220), st.integers(1, 255)), max_size=3))
def test_truncated_and_flipped_files(cut, flips, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"aa": torch.ones(2, 3), "bb": torch.ones(5).half()}, path)
    data = bytearray(path.read_bytes())[: max(0, len(path.read_bytes()) - cut) if cut < 60 else None]
    for where, change in flips:
        if where < len(data):
            data[where] ^= change
    path.write_bytes(data)
    agree(path)


numbers = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 2**64 + 8, 1.0, True, None, "4"]))
tensor_items = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "x", 4]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        }
    ),
    st.just(item()),
    st.just(item("F16", (2, 1), (8, 12))),
    st.none(),
    st.lists(numbers, max_size=3),
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), tensor_items, max_size=3), size=st.integers(0, 24)
)
def test_odd_headers(header, size, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode(header, b"\1" * size))
    agree(path)


def test_the_library_refuses_the_broken_files_too(tmp_path):
    """The oracle is awake: of BROKEN, it lets pass only what it leaves to its callers."""
    passed = set()
    for name, (data, _) in BROKEN.items():
        path = tmp_path / "a.safetensors"
        path.write_bytes(data)
        try:
            with safe_open(path, "pt"):
                passed.add(name)
        except (SafetensorError, OSError, TypeError):
            pass
    assert passed == {"more keys", "spaces first"}
