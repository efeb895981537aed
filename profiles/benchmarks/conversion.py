"""What conversions without training cost SmolLM2-135M: cross-entropy on held-out text, every method, grouping and calibration.

Promise: from 3 to 1 KV heads, the best method adds at most 0.10 of what `mean` adds with real text, 0.18 with text that the
model samples itself, 0.30 with random tokens. And degrouped to 9 heads, dealt out in another order, it comes back to 3 without
loss where heads are grouped by measurement.

The text is Python's language reference: its first tokens are held out, what lies behind its first fifth is calibrated on. From
3 to 1 there is one group, so both groupings are one.

    python -m profiles.benchmarks.conversion OUT.json MODEL.gguf
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.convert import METHODS, Converter, convert_weights
from exporter.convert.attention import AttentionWeights
from exporter.convert.calibration import WINDOW, WINDOWS
from exporter.convert.methods import SHARINGS, held
from exporter.engines.torch_eager import open_torch
from exporter.evaluate import cross_entropy, default_text
from exporter.tokenizer import Tokenizer
from profiles.benchmarks.record import save

HELD_OUT = 8 * (WINDOW - 1) + 1  # tokens: eight windows, each token predicted once
CALIBRATIONS = ("none", "random", "self", "text")
LIMITS = {"text": 0.10, "self": 0.18, "random": 0.30}  # of what the mean adds
LOSSLESS = 1e-4  # nats a token
PROMISE = (
    f"3 → 1 KV heads without training: the best method adds at most {LIMITS['text']} of what the mean adds with text, "
    f"{LIMITS['self']} self-sampled, {LIMITS['random']} with random tokens; 9 shuffled → 3 grouped by measurement loses nothing"
)


def loss(checkpoint: Checkpoint, tokens: np.ndarray) -> float:
    """Nats a token, each window read from an empty cache."""
    with open_torch(checkpoint, capacity=WINDOW) as session:
        return cross_entropy(session, tokens, WINDOW, WINDOW - 1).nats_per_token


def shuffled(checkpoint: Checkpoint, heads: int, seed: int = 0) -> Checkpoint:
    """The same model with `heads` KV heads a layer, each layer's in an order of its own."""
    config, weights = convert_weights(checkpoint.config, checkpoint.weights, heads)
    generator = np.random.default_rng(seed)
    dealt = dict(weights)
    for layer in range(config.num_layers):
        order = generator.permutation(heads).tolist()
        for name, tensor in (
            AttentionWeights.read(config, weights, layer, torch.float32).ordered(order).tensors(config, layer).items()
        ):
            dealt[name] = held(name, tensor)
    return dataclasses.replace(checkpoint, config=config, weights=dealt)


def measure(checkpoint: Checkpoint, groups: int, tokens: np.ndarray, original: float, **how: Any) -> dict[str, Any]:
    """One row: what `how` (options of Converter) costs from `checkpoint` to `groups` KV heads."""
    start = time.perf_counter()
    config, weights = Converter(checkpoint, **how)(groups)
    weights = {name: held(name, tensor.read()) for name, tensor in weights.items()}
    seconds = time.perf_counter() - start
    value = loss(dataclasses.replace(checkpoint, config=config, weights=weights), tokens)
    row = {"from": checkpoint.config.kv_heads[0], "to": groups, **how}
    row |= {"nats_per_token": value, "added": value - original, "seconds": round(seconds, 1)}
    return row


def main() -> None:
    out, model = Path(sys.argv[1]), Path(sys.argv[2])
    checkpoint = open_checkpoint(model)
    text = default_text()
    tokens = Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(text[: 8 * HELD_OUT], special=False)[:HELD_OUT]
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)

    original = loss(checkpoint, tokens)
    add({"from": 3, "to": 3, "nats_per_token": original, "added": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        calibration_text = Path(folder) / "text"
        calibration_text.write_text(text[len(text) // 5 :], "utf-8")
        for method in METHODS:
            for calibration in CALIBRATIONS if method in SHARINGS else (None,):
                source = str(calibration_text) if calibration == "text" else calibration
                row = measure(checkpoint, 1, tokens, original, method=method, calibration=source)
                add({**row, "calibration": calibration})
    mean = rows[1]["added"]
    for row in rows[1:]:
        row["share_of_mean"] = row["added"] / mean
    dealt = shuffled(checkpoint, 9)
    for sharing in SHARINGS:
        for grouping in ("contiguous", "best"):
            add(measure(dealt, 3, tokens, original, method=sharing, grouping=grouping, calibration="none"))
    best = {
        name: min(row["share_of_mean"] for row in rows[1:] if row.get("calibration") == name and "share_of_mean" in row)
        for name in LIMITS
    }
    lossless = all(abs(row["added"]) <= LOSSLESS for row in rows if row.get("grouping") == "best")
    kept = lossless and all(best[name] <= limit for name, limit in LIMITS.items())
    print(f"kept: {kept} {best} ({PROMISE})")
    settings: dict[str, Any] = {"model": checkpoint.name, "held_out_tokens": HELD_OUT, "window": WINDOW}
    settings |= {"calibration_tokens": WINDOWS * WINDOW, "limits": LIMITS, "threads": torch.get_num_threads()}
    save(out, "conversion", PROMISE, rows, kept, **settings)


if __name__ == "__main__":
    main()
