"""Weights as int8 or int4 in blocks that share a scale, rounded to the nearest or on calibration tokens."""

from exporter.quantise.quantiser import QUANTIZE, Quantiser, check_quantise, quantised_names, restored

__all__ = ["QUANTIZE", "Quantiser", "check_quantise", "quantised_names", "restored"]
