"""What conversions without training cost: cross-entropy on held-out text, every method, grouping and calibration.

On SmolLM2-135M from 3 to 1 KV heads (one group, so both groupings are one), and, its KV heads repeated to 9 and dealt out in
another order in each layer, from 9 to 3: there groups that are found by measurement lose nothing. And on a small model that was
trained here with 8 KV heads (profiles/benchmarks/small_model.py) to 4, 2 and 1, the paper's own case.

Promise: at 3 → 1 and 8 → 2, the best method adds at most 0.10 of what `mean` adds with real text, 0.18 with text that the model
samples itself, 0.30 with random tokens; of the paper's three poolings, mean adds least. (Without training, which of `first` and
`random` comes second is a matter of the draw.)

SmolLM2's text is Python's language reference: its first tokens are held out, what lies behind its first fifth is calibrated on.

    python -m profiles.benchmarks.small_model SMALL
    python -m profiles.benchmarks.conversion OUT.json MODEL.gguf SMALL [MINUTES]

Every figure is written to OUT.json.rows as it is measured. A run that was stopped, or whose MINUTES are over, goes on from
there; OUT.json comes when all are there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
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
from profiles.benchmarks.record import Rows, save

HELD_OUT = 8 * (WINDOW - 1) + 1  # tokens: eight windows, each token predicted once
CALIBRATIONS = ("none", "random", "self", "text")
LIMITS = {"text": 0.10, "self": 0.18, "random": 0.30}  # of what the mean adds
JUDGED = (("smollm2", 1), ("small", 2))  # study and KV heads that the limits are for
LOSSLESS = 1e-4  # nats a token
PROMISE = (
    f"without training, 3 → 1 KV heads of SmolLM2-135M and 8 → 2 of a small model: the best method adds at most "
    f"{LIMITS['text']} of what the mean adds with text, {LIMITS['self']} self-sampled, {LIMITS['random']} with random tokens; "
    "9 shuffled → 3 grouped by measurement loses nothing; of mean, first and random, mean adds least"
)


@dataclasses.dataclass(frozen=True)
class Study:
    """One model to convert: `tokens` are held out, `text` is what it may be calibrated on."""

    name: str
    checkpoint: Checkpoint
    targets: tuple[int, ...]
    tokens: np.ndarray
    text: Path

    def ways(self) -> Iterator[dict[str, Any]]:
        """Every method, grouping and calibration, by target."""
        for groups in self.targets:
            for method in METHODS:
                for grouping in ("contiguous", "best") if method in SHARINGS and groups > 1 else ("contiguous",):
                    for calibration in CALIBRATIONS if method in SHARINGS else (None,):
                        yield {"to": groups, "method": method, "grouping": grouping, "calibration": calibration}


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


def studies(model: Path, small: Path, folder: Path) -> Iterator[Study]:
    """SmolLM2 as it is, SmolLM2 with nine shuffled heads, the small model. `folder` takes the calibration text."""
    checkpoint, text = open_checkpoint(model), default_text()
    tokens = encoded(checkpoint, text[: 8 * HELD_OUT])
    (folder / "text").write_text(text[len(text) // 5 :], "utf-8")
    trained, held_out = open_checkpoint(small), (small / "held_out.txt").read_text("utf-8")
    yield Study("small", trained, (4, 2, 1), encoded(trained, held_out), small / "calibration.txt")
    yield Study("smollm2", checkpoint, (1,), tokens, folder / "text")
    yield Study("smollm2, 9 shuffled", shuffled(checkpoint, 9), (3,), tokens, folder / "text")


def encoded(checkpoint: Checkpoint, text: str) -> np.ndarray:
    return Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(text, special=False)[:HELD_OUT]


def run(study: Study, rows: Rows, until: float) -> None:
    """Measure what `rows` lack of a study; stops between two of them at the time `until`."""
    key = {"study": study.name, "to": study.checkpoint.config.kv_heads[0], "method": None}
    if (before := rows.find(key)) is None:
        value = loss(study.checkpoint, study.tokens)
        before = rows.add({**key, "nats_per_token": value, "added": 0.0})
    for how in study.ways():
        if rows.find({"study": study.name, **how}) is None and time.perf_counter() < until:
            given = {name: value for name, value in how.items() if name != "to"}
            given["calibration"] = str(study.text) if how["calibration"] == "text" else how["calibration"]
            row = measure(study.checkpoint, how["to"], study.tokens, before["nats_per_token"], **given)
            rows.add({"study": study.name, **row, **how})


def judge(rows: list[dict[str, Any]]) -> tuple[bool, dict[str, Any]]:
    """Adds each row's share of what the mean adds; whether the promise is kept, and the best share by study and calibration."""
    means = {(row["study"], row["to"]): row["added"] for row in rows if row["method"] == "mean"}
    for row in rows:
        if row["method"] is not None:
            row["share_of_mean"] = row["added"] / means[row["study"], row["to"]]
    best = {
        f"{study}, {groups} KV heads, {name}": min(
            row["share_of_mean"]
            for row in rows
            if (row["study"], row["to"], row.get("calibration")) == (study, groups, name) and row["method"] is not None
        )
        for study, groups in JUDGED
        for name in LIMITS
    }
    kept = all(share <= LIMITS[name.rsplit(", ", 1)[1]] for name, share in best.items())
    grouped = [row for row in rows if row["study"] == "smollm2, 9 shuffled" and row.get("grouping") == "best"]
    kept &= all(abs(row["added"]) <= LOSSLESS for row in grouped if row["calibration"] == "none")
    for groups in (4, 2, 1):
        mean, first, random = (
            next(row["added"] for row in rows if (row["study"], row["to"], row["method"]) == ("small", groups, method))
            for method in ("mean", "first", "random")
        )
        kept &= mean < min(first, random)
    return kept, best


def main() -> None:
    out, model, small = map(Path, sys.argv[1:4])
    until = time.perf_counter() + 60 * float(sys.argv[4]) if len(sys.argv) > 4 else float("inf")
    rows = Rows(out.with_name(out.name + ".rows"))
    settings: dict[str, Any] = {"held_out_tokens": HELD_OUT, "window": WINDOW, "calibration_tokens": WINDOWS * WINDOW}
    settings |= {
        "limits": LIMITS,
        "threads": torch.get_num_threads(),
        "small": json.loads((small / "training.json").read_text()),
    }
    with tempfile.TemporaryDirectory() as folder:
        for study in studies(model, small, Path(folder)):
            run(study, rows, until)
            if any(rows.find({"study": study.name, **how}) is None for how in study.ways()):
                print(f"{len(rows.rows)} rows so far; run it again to go on")
                return
    kept, best = judge(rows.rows)
    print(f"kept: {kept} {best} ({PROMISE})")
    save(out, "conversion", PROMISE, rows.rows, kept, best=best, model=model.stem, **settings)
    rows.path.unlink()


if __name__ == "__main__":
    main()
