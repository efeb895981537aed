"""Fewer (or more) KV heads on lazy weights: no model, no files."""

from exporter.convert.methods import GROUPINGS, METHODS, Grouping, Method, conversion_record, convert_weights
from exporter.convert.stage import Converter, convert_checkpoint

__all__ = [
    "GROUPINGS",
    "METHODS",
    "Converter",
    "Grouping",
    "Method",
    "conversion_record",
    "convert_checkpoint",
    "convert_weights",
]
