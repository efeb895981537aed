"""Where headpool's operator library (runtime/ops) is."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import EngineError


def operator_library() -> Path:
    """headpool's operators for ONNX Runtime, as scripts/ops builds them. Raises EngineError where they were not."""
    path = Path(__file__).with_name("libheadpool_ops.so")
    if not path.is_file():
        raise EngineError(
            "pattern fused needs headpool's operator library, which was not built here: run scripts/ops, "
            "which needs a C++ compiler, or use the pattern grouped"
        )
    return path
