"""ONNX only: the canonical node, its lowerings, verification. Never imports torch."""
