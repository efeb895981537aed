"""headpool itself, in a process like the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.bundle import Bundle
from exporter.engines import open_session
from profiles.peers.runner import Runner

PATTERNS = ("fused", "grouped", "gqa")


def export(checkpoint: Path, out: Path, weights: str) -> None:
    from exporter.checkpoint import open_source
    from exporter.export import ExportOptions
    from exporter.export import export as export_bundle

    options = ExportOptions(patterns=PATTERNS, quantize=None if weights == "fp32" else weights)
    export_bundle(open_source(checkpoint), out, options, lambda what, done, total: None)


class Peer(Runner):
    """`pattern` is the one to run."""

    def __init__(self, model: Path, batch: int, capacity: int, threads: int, pattern: str = "") -> None:
        bundle = Bundle.open(model)
        [variant] = [variant for variant in bundle.variants if variant.pattern == pattern]
        self.session = open_session(bundle, variant, batch=batch, capacity=capacity, threads=threads)
        self.versions, self.options = dict(self.session.info.versions), dict(self.session.info.options)

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        return self.session.decode(tokens[:, 0]) if tokens.shape[1] == 1 else self.session.prefill(list(tokens))

    def rewind(self, length: int) -> None:
        self.session.rewind(length)
