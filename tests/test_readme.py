"""The README's commands run, and its file tree is the repository's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"<!-- tested -->\n```bash\n(.*?)```", README, re.DOTALL)
PACKAGES = ("exporter", "graphs", "profiles")


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with the checkpoint that the README calls llama/: tiny, with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    core = tokenizers.ByteLevelBPETokenizer()
    core.train_from_iterator(["The capital of France is"], vocab_size=300, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path


def test_commands(workplace):
    """Block by block in one folder, as a reader would type them; every line has to succeed."""
    assert len(BLOCKS) >= 4
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-xc", block],
            cwd=workplace,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for page in ("out/report.html", "both.html"):
        assert (workplace / page).read_text("utf-8").lower().startswith("<!doctype html>")


def tree() -> list[str]:
    """Paths of the annotated tree, which says folder by indentation and ends folders with a slash."""
    [text] = re.findall(r"<!-- tree -->\n```text\n(.*?)```", README, re.DOTALL)
    paths, parents = [], []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_the_tree_names_what_there_is():
    paths = tree()
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_tree_is_whole():
    """Every module of the packages but the empty ones, every script, every folder of tests."""
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = {str(path.relative_to(ROOT)) for path in modules if len(path.read_text("utf-8").splitlines()) > 1}
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / "scripts").iterdir() if path.is_file()}
    files |= {f"{path.relative_to(ROOT)}/" for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert sorted(files - set(tree())) == []
