"""The GLU papers' experiments at the scale of two CPU cores: models trained from scratch at equal parameters, some seeds.

1. "GLU Variants Improve Transformer" (Shazeer 2020, arXiv 2002.05202, table 1): eight FFNs, gated ones two thirds as wide.
2. "GLU Attention Improve Transformer" (Wang 2025, arXiv 2507.00022): gated values of two thirds of the channels against plain
   attention, both beside a SwiGLU; then W_V and W_O have as many parameters together.

4 layers, d 192, 4 heads of 48 with RoPE, FFN 768 or 512, a vocabulary of 2,048, on the source of Python's standard library, by
`headpool uptrain` from random weights. Models of one seed see the same batches. The figure is the cross-entropy on windows held
out, in nats a token (the papers' log-perplexity), after 65,536 and 524,288 steps of their batches there, STEPS of ours here.

Promise: in both, every model trains; which of the papers' orders hold at this scale is what the rows say.

    python -m profiles.benchmarks.glu_training OUT.json [STEPS]

Every model is written to OUT.json.rows as it is trained; a run that was stopped goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint.own_config import own_config
from exporter.config import FFN_KINDS, GATED_FFN_KINDS, ModelConfig
from exporter.uptrain.metrics import read_metrics
from profiles.benchmarks.record import Rows, save
from profiles.benchmarks.uptraining import documents, trained, write_data

STEPS, SEEDS, CURVE = 400, (0, 1, 2), 50  # steps of a model, its seeds, steps between two points of its curve
RATE = 2e-3
HEAD, GATED_VALUE = 48, 32  # channels of a head; of gated values
CONFIG = ModelConfig(
    vocab_size=2048,
    hidden_size=192,
    num_layers=4,
    num_heads=4,
    kv_heads=(4,) * 4,
    head_dim=HEAD,
    intermediate_size=512,
    max_positions=256,
    ffn="swiglu",
    tied=True,
    family="headpool",
)
# Held-out log-perplexity after 65,536 steps (2002.05202, table 1).
PAPER = {"relu": 1.997, "gelu": 1.983, "swish": 1.994, "glu": 1.982, "bilinear": 1.960, "geglu": 1.942, "swiglu": 1.944,
         "reglu": 1.953}  # fmt: skip
PROMISE = "eight FFNs, and plain and GLU attention, at equal parameters: held-out log-perplexity with its spread over seeds"


def models() -> Iterator[tuple[dict[str, Any], ModelConfig]]:
    for ffn in FFN_KINDS:
        width = 512 if ffn in GATED_FFN_KINDS else 768
        yield {"ffn": ffn, "attention": "plain"}, dataclasses.replace(CONFIG, ffn=ffn, intermediate_size=width)
    yield {"ffn": "swiglu", "attention": "glu"}, dataclasses.replace(CONFIG, glu_value_dim=GATED_VALUE)


def train(config: ModelConfig, folder: Path, data: tuple[str, ...], steps: int, seed: int) -> dict[str, Any]:
    """One model from random weights."""
    (folder / "config.json").write_text(json.dumps(own_config(config, torch.float32)))
    out = folder / "trained"
    done = trained(folder / "config.json", out, data, steps, lr=RATE, seed=seed, save_every=CURVE)
    curve = [(row["step"], row["held_out"]) for row in read_metrics(out) if "held_out" in row]
    return {"parameters": done.parameters, "nats_per_token": done.after, "seconds": round(done.seconds, 1), "curve": curve}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of every model, best first, beside the paper's."""
    means = []
    for key, _ in models():
        found = [row["nats_per_token"] for row in rows if key.items() <= row.items()]
        mean = sum(found) / len(found)
        spread = math.sqrt(sum((value - mean) ** 2 for value in found) / (len(found) - 1))
        paper = PAPER[key["ffn"]] if key["attention"] == "plain" else None
        means.append({**key, "nats_per_token": mean, "spread": spread, "paper": paper})
    return sorted(means, key=lambda row: row["nats_per_token"])


def main() -> None:
    out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    rows = Rows(out.with_name(out.name + ".rows"))
    for seed in SEEDS:
        for key, config in models():
            if rows.find({**key, "seed": seed}) is None:
                with tempfile.TemporaryDirectory() as folder:
                    data = write_data(Path(folder), documents())
                    row = train(config, Path(folder), (data["held"], data["train"]), steps, seed)
                rows.add({**key, "seed": seed, "d_ff": config.intermediate_size, **row})
    found = summary(rows.rows)
    for row in found:
        paper = f" (paper: {row['paper']})" if row["paper"] else ""
        print(f"{row['ffn']:<8} {row['attention']:<5} {row['nats_per_token']:.4f} ± {row['spread']:.4f}{paper}")
    kept = all(math.isfinite(row["nats_per_token"]) for row in rows.rows)
    settings: dict[str, Any] = {"config": CONFIG.to_json(), "steps": steps, "lr": RATE, "threads": torch.get_num_threads()}
    save(out, "glu training", PROMISE, rows.rows, kept, summary=found, **settings)
    rows.path.unlink()


if __name__ == "__main__":
    main()
