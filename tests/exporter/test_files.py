"""Outputs that are whole or absent, and the work that runs beside them."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from exporter.background import Background
from exporter.checkpoint import scan
from exporter.errors import UserError
from exporter.files import alone_in, new_file, new_folder, refuse_existing


def test_an_output_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out exists"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="file exists"), new_file(tmp_path / "file"):
        (tmp_path / "file").write_text("theirs")
    assert (tmp_path / "file").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_dangling_link_counts_as_an_output(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="out exists"):
        refuse_existing(tmp_path / "out")


def test_errors_name_the_output_and_not_its_temporary_sibling(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError) as error,
        new_folder(tmp_path / "out") as outer,
        new_folder(outer / "bundle") as inner,
        new_file(inner / "model.safetensors"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(error.value) == f"{tmp_path}/out/bundle/model.safetensors cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())


def test_background_gives_what_came_of_it() -> None:
    assert Background(lambda a, b: a + b, 2, b=3).result() == 5

    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Background(fail).result()


def test_scan_is_the_hash_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two" * 1_000_000)
    assert scan((tmp_path / "a", tmp_path / "b")) == hashlib.sha256(b"one" + b"two" * 1_000_000).hexdigest()


def test_what_a_killed_call_left_is_removed_folders_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".step-10.partial").mkdir()
    (tmp_path / "run" / ".step-10.partial" / "weights").write_text("half")
    (tmp_path / "run" / ".plan.partial").write_text("half")
    (tmp_path / "run" / "kept").write_text("")
    with alone_in(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]
    with alone_in(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was put into it
