"""Checkpoint → torch model → fewer KV heads → canonical ONNX → bundle → engine."""
