"""Uptraining: short continued pre-training of a converted checkpoint (Ainslie et al. 2023, arXiv 2305.13245, section 2.1)."""

from exporter.uptrain.options import OPTIMIZERS, PRECISIONS, TRAINABLE, UptrainOptions
from exporter.uptrain.stage import Uptrained, uptrain

__all__ = ["OPTIMIZERS", "PRECISIONS", "TRAINABLE", "UptrainOptions", "Uptrained", "uptrain"]
