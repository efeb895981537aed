"""What the example programs refuse: one line and exit code 2, before anything is measured, and nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_engines
import hf
import pytest
from building import run

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.export import ExportOptions, export


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("examples")
    return export(open_checkpoint(hf.save("llama", folder)), folder / "bundle", ExportOptions(patterns=("grouped",)))


def refused(program: Path, *words: object, prepare: Callable[[], Any] | None = None) -> str:
    """What it says, after its name; it printed nothing else."""
    done = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, preexec_fn=prepare, restore_signals=False, timeout=60
    )
    assert (done.returncode, done.stdout if prepare is None else "") == (2, ""), done
    name = program.name.removesuffix("_fake")
    assert done.stderr.startswith(f"{name}: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    return done.stderr.removeprefix(f"{name}: ").strip()


WORDS: list[tuple[tuple[object, ...], str]] = [
    (("8", "99999999999999999999"), 'SAMPLES "99999999999999999999" is not a whole number from 1 to 1000000'),
    (("8", "12x"), 'SAMPLES "12x" is not a whole number from 1 to 1000000'),
    (("8", "0"), 'SAMPLES "0" is not a whole number from 1 to 1000000'),
    (("8", ""), 'SAMPLES "" is not a whole number from 1 to 1000000'),
    (("8", "16", "1025"), 'THREADS "1025" is not a whole number from 0 to 1024'),
    (("8", "16", "-1"), 'THREADS "-1" is not a whole number from 0 to 1024'),
    (("8", "16", "1", "0"), 'BATCH "0" is not a whole number from 1 to 65536'),
    (("8x",), 'CONTEXT "8x" is not a whole number from 1 to 2147483647'),
    (("",), 'CONTEXT "" is not a whole number from 1 to 2147483647'),
    (("8,",), 'CONTEXT "" is not a whole number from 1 to 2147483647'),
    (("8,,16",), 'CONTEXT "" is not a whole number from 1 to 2147483647'),
    (("8,16,08",), "CONTEXT 08 is given twice"),
    (
        ("8,128",),
        "a context of 128 tokens and the one decoded after it is more than the model's 128; choose contexts up to 127",
    ),
]


@pytest.mark.parametrize(("words", "message"), WORDS, ids=[" ".join(map(str, words)) or "none" for words, _ in WORDS])
def test_numbers_of_bench(words: tuple[object, ...], message: str, built: Path, bundle: Bundle, tmp_path: Path) -> None:
    assert refused(built / "examples/bench", bundle.path, "", tmp_path / "out.json", *words) == message
    assert not any(tmp_path.iterdir())


def test_a_context_that_no_engine_has_room_for(built: Path, bundle: Bundle, tmp_path: Path) -> None:
    with_engines = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    fake_engines.add(with_engines, with_engines.variants[0], "tensorrt")
    words = ("--backend", "tensorrt", with_engines.path, "", tmp_path / "out.json", "8,124")
    assert "engines for 120 tokens a sequence, this session wants 128; " in refused(built / "tests/bench_fake", *words)


@pytest.mark.parametrize("example", ["bench", "generate"])
def test_words_that_are_not_due(example: str, built: Path, bundle: Bundle) -> None:
    program = built / "examples" / example
    usage = refused(program, bundle.path, "")
    assert usage.startswith(f"usage: {example} [--backend NAME] BUNDLE VARIANT ")
    assert run(program, "--help") == run(program, "-h", "more") == f"{usage}\n"
    if example == "bench":
        assert refused(program, bundle.path, "", "out.json", 8, 16, 1, 1, 1) == usage
    nameless = "--backend lacks a name; choose from onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx"
    assert refused(program, "--backend") == refused(program, "--backend", "", bundle.path, "", 1, 1) == nameless
    assert refused(program, "--backed", "x", bundle.path) == f"option --backed is unknown; {usage}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("12x", 1), 'NEW-TOKENS "12x" is not a whole number from 1 to 2147483647'),
        (("0", 1), 'NEW-TOKENS "0" is not a whole number from 1 to 2147483647'),
        (("99999999999999999999", 1), 'NEW-TOKENS "99999999999999999999" is not a whole number from 1 to 2147483647'),
        (
            (4, "1", "2x"),
            'built without -DTOKENIZERS_CPP (see README), token id "2x" is not a whole number from 0 to 2147483647',
        ),
        ((4, "-1"), 'built without -DTOKENIZERS_CPP (see README), token id "-1" is not a whole number from 0 to 2147483647'),
        ((4, 5, 67), "token id 67, prompt[1], is outside the vocabulary of 67"),
        ((130, 1), "the prompt of 1 token and 130 new need 130 cache rows, the capacity is 128"),
    ],
)
def test_words_of_generate(words: tuple[object, ...], message: str, built: Path, bundle: Bundle) -> None:
    assert refused(built / "examples/generate", bundle.path, "", *words) == message


def test_where_bench_cannot_write(built: Path, bundle: Bundle, tmp_path: Path) -> None:
    program = built / "examples/bench"
    link, there = tmp_path / "link.json", tmp_path / "there.json"
    link.symlink_to(tmp_path / "nothing")
    there.touch()

    def measure(out: object) -> str:
        # A million steps are not made: it is known before.
        return refused(program, bundle.path, "", out, 8, 1000000, 1)

    for path in (link, there, tmp_path):
        assert measure(path) == f"{path} exists; choose another name or remove it"
    assert measure("/dev/null") == "/dev/null is a device; choose the name of a file"
    missing = tmp_path / "no/out.json"
    assert measure(missing) == f"{missing} cannot be written: No such file or directory; choose another place"
    below = there / "out.json"
    assert measure(below) == f"{below} cannot be written: Not a directory; choose another place"
    assert measure("/proc/out.json") == "/proc/out.json cannot be written: No such file or directory; choose another place"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid():  # root writes everywhere
        assert "Permission denied" in measure(closed / "out.json")
    assert sorted(tmp_path.iterdir()) == [closed, link, there]


def test_a_full_disk(built: Path, bundle: Bundle, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    out = tmp_path / "out.json"
    message = refused(built / "examples/bench", bundle.path, "", out, 8, 16, 1, prepare=limit)
    assert message == f"{out} cannot be written: File too large; choose another place"
    assert not any(tmp_path.iterdir())


def test_tokens_that_nobody_can_read(built: Path, bundle: Bundle) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [built / "examples/generate", bundle.path, "", "100", "1"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "generate: the tokens cannot be written\n")
