"""Where weights lie: linked where they serve as they are, under names of their own, and the checkpoint untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from exporter.bundle import Bundle
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.engines import open_session
from exporter.errors import UserError
from exporter.export import ExportOptions, export
from graphs.verify import check_model


def test_links_write_almost_nothing(snapshot, checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    before = snapshot(saved)
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(groups=(2, 1), storage="link"))
    assert (tmp_path / "out" / "model.safetensors").samefile(saved / "model.safetensors")
    own = [path for path in (tmp_path / "out").glob("*.safetensors") if path.stat().st_nlink == 1]
    assert [path.name for path in own] == ["model.g1.safetensors"]
    assert snapshot(saved) == before
    for variant in bundle.variants:
        check_model(bundle.graph_path(variant))
    check_against = export(checkpoint, tmp_path / "copy", ExportOptions(groups=(2, 1)))
    assert [v.weight_bytes for v in bundle.variants] == [v.weight_bytes for v in check_against.variants]


def test_shards_that_are_symbolic_links_are_linked_to_their_files(saved: Path, tmp_path: Path) -> None:
    """A Hugging Face cache holds links to blobs; ONNX Runtime would refuse the links themselves."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in saved.iterdir():
        (cache / path.name).symlink_to(path)
    bundle = export(open_checkpoint(cache), tmp_path / "out", ExportOptions(storage="link"))
    assert not (bundle.path / "model.safetensors").is_symlink()
    assert (bundle.path / "model.safetensors").samefile(saved / "model.safetensors")


def test_another_dtype_is_copied_also_with_links(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "out", ExportOptions(storage="link", dtype="fp16"))
    assert all(path.stat().st_nlink == 1 for path in bundle.path.iterdir())


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_link_that_cannot_be_made(number: int, checkpoint: Checkpoint, saved: Path, tmp_path: Path, monkeypatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError) as error:
        export(checkpoint, tmp_path / "out", ExportOptions(storage="link"))
    assert str(error.value) == (
        f"{saved}/model.safetensors cannot be hard-linked beside the bundle ({os.strerror(number)}); use --weights copy"
    )
    assert not list(tmp_path.iterdir())


def sharded(saved: Path, folder: Path, names: tuple[str, str]) -> Path:
    """A copy of `saved` with two shards called `names`: its K and V projections, and the rest."""
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(saved / "model.safetensors")
    weight_map = {name: names[".k_proj." not in name and ".v_proj." not in name] for name in state}
    for shard in names:
        save_file({name: tensor for name, tensor in state.items() if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("groups", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ("model.g1.safetensors", "model.rest.safetensors"),
        ("a.safetensors", "model.g1.safetensors"),
        ("model.g1.onnx", "headpool.json"),
        ("genai_config.json", "generation_config.json.partial"),
    ],
    ids=" ".join,
)
def test_shards_named_as_what_export_writes(names: tuple[str, str], groups, snapshot, saved: Path, tmp_path: Path) -> None:
    """Both are there, nothing is written through a link into the checkpoint, and the logits are those of a copy."""
    source = sharded(saved, tmp_path / "in", names)
    before = snapshot(source)
    linked = export(open_checkpoint(source), tmp_path / "linked", ExportOptions(groups=groups, storage="link"))
    assert snapshot(source) == before
    assert sum(path.stat().st_nlink > 1 for path in linked.path.iterdir()) == 2
    copied = export(open_checkpoint(saved), tmp_path / "copied", ExportOptions(groups=groups))
    for variant in ("g2", "g1"):
        assert np.array_equal(logits(linked, variant), logits(copied, variant))


def logits(bundle: Bundle, variant: str) -> np.ndarray:
    with open_session(bundle, variant, capacity=8, threads=1) as session:
        return session.prefill([np.array([5, 9, 33, 17])]).copy()
