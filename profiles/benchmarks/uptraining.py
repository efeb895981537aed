"""What a little training brings back: a small MHA model trained here from scratch, converted to fewer KV heads, uptrained for
α = 0 … 0.1 of its own steps (Ainslie et al. 2023, figure 5, and section 3.3 on the conversion's methods).

Promise: at 2 of 8 KV heads and α = 0.05, the best method is within 2 % of the MHA model's loss.

The text is the source of Python's standard library, a byte-level BPE of 2,048 tokens learnt on it: one part is trained on from
scratch, another one uptrained on and calibrated on, both after the same windows held out. `none` is the MHA model itself
uptrained as long, `distilled` the best method with the MHA model as teacher.

    python -m profiles.benchmarks.uptraining OUT.json FOLDER [STEPS]

FOLDER keeps the models: a run that was stopped goes on from there. One and a half hours on one core.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.convert import convert_checkpoint
from exporter.uptrain import Uptrained, UptrainOptions, uptrain
from exporter.uptrain.metrics import read_metrics
from exporter.uptrain.stage import RECORD
from profiles.benchmarks.record import save

STEPS = 4000  # of training from scratch
ALPHAS = (0.01, 0.02, 0.05, 0.1)  # and 0, which is before any
GROUPS = 2
BEST = "optimal"
METHODS = ("none", "mean", BEST, "distilled")
WITHIN, AT = 1.02, 0.05
PROMISE = f"GQA-{GROUPS} of 8 heads, uptrained for α = {AT}: the best method's loss is at most {WITHIN} × the MHA model's"
VOCABULARY, WINDOW, BATCH, HELD_OUT = 2048, 128, 16, 64
RATE, UPTRAINING_RATE = 2e-3, 5e-4
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def documents() -> list[str]:
    """The standard library's modules, in an order drawn once."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    texts = [path.read_text("utf-8", errors="ignore") for path in paths]
    return [texts[index] for index in np.random.default_rng(0).permutation(len(texts))]


def write_data(folder: Path, texts: list[str]) -> dict[str, str]:
    """Files of text: held out, trained on, uptrained on (a third of the rest), calibrated on; config.json, a tokenizer."""
    import tokenizers

    held = next(count for count in range(len(texts)) if sum(map(len, texts[:count])) > 6 * WINDOW * HELD_OUT)
    middle = held + (len(texts) - held) * 2 // 3
    parts = {"held": texts[:held], "train": texts[held:middle], "uptrain": texts[middle:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part), "utf-8")
    (folder / "calibration.txt").write_text("".join(texts[middle:])[: 1 << 20], "utf-8")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[held:middle], VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(MODEL))
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def trained(source: Path, out: Path, data: tuple[str, ...], steps: int, **changes: Any) -> Uptrained:
    given: dict[str, Any] = {"window": WINDOW, "batch": BATCH, "held_out": HELD_OUT, "lr": UPTRAINING_RATE, "warmup": 0.1}
    if not out.exists():
        uptrain(source, out, UptrainOptions(data, steps=steps, **{**given, **changes}))
    return Uptrained(**json.loads((out / RECORD).read_text("utf-8"))["outcome"])


def rows(folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """The MHA model first, then every method at every α."""
    data = write_data(folder, documents())
    base = folder / "mha"
    done = trained(folder / "config.json", base, (data["held"], data["train"]), steps, lr=RATE)
    curve = [(row["step"], row["held_out"]) for row in read_metrics(base) if "held_out" in row]
    yield {"method": "mha", "kv_heads": 8, "nats_per_token": done.after, "steps": steps, "tokens": done.tokens,
           "parameters": done.parameters, "dtype": done.dtype, "seconds": round(done.seconds, 1), "curve": curve}  # fmt: skip
    converted = {"none": base, "distilled": folder / BEST}
    for method in ("mean", BEST):
        calibration = str(folder / "calibration.txt") if method == BEST else None
        converted[method] = folder / method
        if not converted[method].exists():
            convert_checkpoint(base, converted[method], GROUPS, method, calibration=calibration)  # type: ignore[arg-type]
    for method in METHODS:
        for alpha in ALPHAS:
            out = folder / f"{method}-{alpha}"
            teacher = {"teacher": str(base)} if method == "distilled" else {}
            count = max(1, round(alpha * steps))
            done = trained(converted[method], out, (data["held"], data["uptrain"]), count, seed=1, **teacher)
            row = {"method": method, "kv_heads": 8 if method == "none" else GROUPS}
            if alpha == ALPHAS[0]:
                yield {**row, "alpha": 0.0, "steps": 0, "nats_per_token": done.before}
            yield {**row, "alpha": alpha, "steps": count, "nats_per_token": done.after, "seconds": round(done.seconds, 1)}


def main() -> None:
    out, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else STEPS
    folder.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = []
    for row in rows(folder, steps):
        row["ratio"] = row["nats_per_token"] / (found[0] if found else row)["nats_per_token"]
        found.append(row)
        print(row, flush=True)
    at = [row["ratio"] for row in found if row.get("alpha") == AT and row["kv_heads"] == GROUPS]
    kept = min(at) <= WITHIN
    print(f"kept: {kept} ({min(at):.4f}; {PROMISE})")
    settings: dict[str, Any] = {"model": MODEL, "steps": steps, "window": WINDOW, "batch": BATCH, "held_out": HELD_OUT}
    settings |= {"lr": RATE, "uptraining_lr": UPTRAINING_RATE, "threads": torch.get_num_threads()}
    save(out, "uptraining", PROMISE, found, kept, **settings)


if __name__ == "__main__":
    main()
