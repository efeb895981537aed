"""What exporting costs: an 8B-shaped checkpoint, and the bytes of a sweep.

Promises: an 8B shape (Llama-3.1-8B's, fp16, sparse zero-filled safetensors) exports with --weights link in at most 40 s and
1.2 GB of memory, writing under 200 MB, and the 12 layers of configs/decoder-12.json in at most 6 s; a sweep over six KV-head
counts writes at most 1.35 × the bytes of one variant.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.checkpoint import expected_shapes
from exporter.checkpoint.hf_config import parse_config
from profiles.benchmarks.decoder import CONFIG
from profiles.benchmarks.process import headpool
from profiles.benchmarks.record import save

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# SmolLM2-135M as multi-head attention with twelve query heads, so that six counts divide them.
SMALL: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "head_dim": 48,
}
SWEEP = (12, 6, 4, 3, 2, 1)
SHARDS = 4
PROMISE = "8B, weights linked: ≤ 40 s, ≤ 1.2 GB, < 200 MB written; 12 layers: ≤ 6 s; six group counts ≤ 1.35 × one's bytes"


def write_sparse(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of zeros that takes no disk: the files are truncated to their length."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(expected_shapes(parse_config(config)).items())
    weight_map, step = {}, -(-len(tensors) // SHARDS)
    for number in range(SHARDS):
        name, header, end = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors", {}, 0
        for tensor, shape in tensors[number * step : (number + 1) * step]:
            size = 2
            for dim in shape:
                size *= dim
            header[tensor] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        raw = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def written(folder: Path) -> int:
    """Bytes of a bundle that are its own: hard links to the checkpoint's files are not."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.stat().st_nlink == 1)


def linked(what: str, checkpoint: Path, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for pattern in ("grouped", "gqa"):
        bundle = checkpoint.with_name(f"{checkpoint.name} {pattern}")
        cost = headpool("export", str(checkpoint), str(bundle), "--dtype", "fp16", "--weights", "link", "--pattern", pattern)
        size = written(bundle)
        kept = cost.seconds <= seconds and cost.peak_bytes <= 1.2e9 and size < 200e6
        row = {"what": what, "pattern": pattern, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes}
        rows.append({**row, "written_bytes": size, "kept": kept})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    out = Path(sys.argv[1])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        (folder / "small.json").write_text(json.dumps(SMALL))
        headpool("export", str(folder / "small.json"), str(folder / "one"), "--groups", "12")
        headpool("export", str(folder / "small.json"), str(folder / "six"), "--groups", ",".join(map(str, SWEEP)))
        one, six = written(folder / "one"), written(folder / "six")
        rows.append({"what": "sweep", "one_bytes": one, "six_bytes": six, "ratio": six / one, "kept": six <= 1.35 * one})
        print(rows[-1], flush=True)
        twelve = {**json.loads(CONFIG.read_text()), "torch_dtype": "float16"}
        for what, config, seconds in (("8B, linked", LLAMA_8B, 40), ("12 layers, linked", twelve, 6)):
            checkpoint = folder / what.split(",")[0]
            write_sparse(checkpoint, config)
            rows += linked(what, checkpoint, seconds)
    kept = all(row["kept"] for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "export", PROMISE, rows, kept, shape=LLAMA_8B, sweep=SMALL, groups=SWEEP)


if __name__ == "__main__":
    main()
