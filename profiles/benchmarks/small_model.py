"""A small multi-head model trained from scratch, for what only such a model shows: the paper's MHA → GQA.

8 query heads and 8 KV heads, Llama's architecture, on the source of Python's standard library (which every machine has), one
file in twenty held out. Batches are drawn from a seed. What it writes is a Hugging Face folder with `held_out.txt` and
`calibration.txt` beside the model: neither was trained on, and they share no file.

    python -m profiles.benchmarks.small_model OUT [STEPS]

2,000 steps of 2,048 tokens take about half an hour on one core.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporter.files import new_folder

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
VOCABULARY, WINDOW, BATCH, STEPS = 4096, 512, 4, 2000
PEAK, WARMUP, DECAY = 2e-3, 100, 0.1  # learning rate, its steps of warm-up, weight decay
HELD_OUT_EVERY = 20  # files; the held-out ones go to the two texts by turns


def texts() -> tuple[str, str, str]:
    """Training, held-out and calibration text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    sources = [path.read_text("utf-8", "replace") for path in files]
    held = [source for number, source in enumerate(sources) if number % HELD_OUT_EVERY == 0]
    train = [source for number, source in enumerate(sources) if number % HELD_OUT_EVERY]
    return "\n".join(train), "\n".join(held[::2]), "\n".join(held[1::2])


def tokenizer(text: str) -> Any:
    """Byte-level BPE of `VOCABULARY` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    return made


def train(out: Path, steps: int = STEPS, seed: int = 0) -> float:
    """Write the trained model to the folder `out`, which must not exist; the last hundred steps' mean loss, nats a token."""
    import torch
    import transformers

    with new_folder(out) as folder:
        text, held_out, calibration = texts()
        codec = tokenizer(text)
        ids = torch.tensor(codec.encode(text).ids)
        print(f"{len(ids):,} tokens to train on, {len(text) / len(ids):.2f} characters each", flush=True)
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            **SHAPE,
            vocab_size=VOCABULARY,
            num_key_value_heads=SHAPE["num_attention_heads"],
            max_position_embeddings=2 * WINDOW,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.LlamaForCausalLM(config)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / WARMUP, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        )
        generator = np.random.default_rng(seed)
        losses: list[float] = []
        start = time.perf_counter()
        for step in range(steps):
            starts = generator.integers(len(ids) - WINDOW, size=BATCH)
            batch = torch.stack([ids[begin : begin + WINDOW] for begin in starts])
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            if step % 100 == 99:
                print(f"{step + 1} steps, {np.mean(losses[-100:]):.4f} nats, {time.perf_counter() - start:.0f} s", flush=True)
        model.save_pretrained(folder)
        codec.save(str(folder / "tokenizer.json"))
        (folder / "held_out.txt").write_text(held_out, "utf-8")
        (folder / "calibration.txt").write_text(calibration, "utf-8")
        final = float(np.mean(losses[-100:]))
        record = {"steps": steps, "tokens_a_step": BATCH * WINDOW, "seed": seed, "last_loss": final}
        (folder / "training.json").write_text(json.dumps(record) + "\n", "utf-8")
    return final


if __name__ == "__main__":
    train(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
