"""Fewer (or more) KV heads on lazy weights: no model, no files."""

from exporter.convert.heads import METHODS, Method, conversion_record, convert_weights
from exporter.convert.stage import convert_checkpoint

__all__ = ["METHODS", "Method", "conversion_record", "convert_checkpoint", "convert_weights"]
