"""Imports run one way, profiles → exporter → graphs, and nothing heavy is imported outside the file that wraps it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("graphs", "exporter", "profiles")  # each may import itself and those before it
WRAPPED = {
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "optimum",
    "onnxruntime_genai",
    "polygraphy",
    "matplotlib",
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path):
    """(module, at module level) of every import statement."""
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_direction(path):
    room = path.relative_to(ROOT).parts[0]
    for module, top in imports(path):
        target = module.split(".")[0]
        if target in ROOMS and ROOMS.index(target) > ROOMS.index(room):
            in_command_line = path.is_relative_to(ROOT / "exporter" / "cli") and not top
            assert in_command_line, f"{path.relative_to(ROOT)} imports {module}"
        if room == "graphs":
            assert target != "torch", f"{path.relative_to(ROOT)} imports torch"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_wrapped_packages_are_imported_where_they_are_used(path):
    for module, top in imports(path):
        wraps = path.is_relative_to(ROOT / "exporter" / "engines") and path.name != "__init__.py"
        assert not (top and module.split(".")[0] in WRAPPED) or wraps, f"{path.relative_to(ROOT)} imports {module} at once"


def test_every_module_imports_and_help_is_light():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    light = (
        "import exporter.cli, sys; assert not {'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", light], check=True, cwd=ROOT)
