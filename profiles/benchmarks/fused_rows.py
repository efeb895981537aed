"""Over how many rows TensorRT for RTX has a fused kernel for attention, found by building one-layer engines, without a GPU.

Promise: `headpool build` lets through all that is built and nothing else, to the row (fused_rows in
exporter/engines/tensorrt/plan.py): in each dtype, with heads of 16 to 128, for one chip and several.

    python -m profiles.benchmarks.fused_rows OUT.json
"""

from __future__ import annotations

import bisect
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.engines.tensorrt import plan
from exporter.engines.tensorrt.build import build
from exporter.engines.tensorrt.plan import BuildOptions, fused_rows
from exporter.errors import EngineError
from exporter.export import ExportOptions, export
from profiles.benchmarks.record import save

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_layers": 1, "hidden_size": 64, "d_model": 64, "d_ff": 64}
LLAMA = {**SIZES, "model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 1 << 20}
T5 = {**SIZES, "model_type": "t5", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
      "feed_forward_proj": "relu", "decoder_start_token_id": 0, "eos_token_id": 1}  # fmt: skip
# model, head size, query and KV heads, dtype, chips, what is bisected
CASES: tuple[tuple[str, int, int, int, str, tuple[str, ...], str], ...] = (
    ("llama", 64, 8, 2, "fp16", ("sm86",), "capacity"),
    ("llama", 128, 8, 2, "bf16", ("sm86", "sm89", "sm120"), "capacity"),
    ("llama", 128, 8, 8, "fp16", ("sm80",), "capacity"),
    ("llama", 16, 6, 1, "fp16", ("sm89",), "capacity"),
    ("t5", 64, 8, 2, "fp32", ("sm86",), "capacity"),
    ("t5", 64, 8, 2, "fp32", ("sm86",), "prefill"),
    ("t5", 64, 8, 8, "bf16", ("sm120",), "prefill"),
)
LEAST, MOST = 4096, 40_000  # rows: both ends of the search
PROMISE = "build lets through as many rows as TensorRT builds, and not one more"


def config(model: str, size: int, heads: int, kv_heads: int) -> dict[str, Any]:
    if model == "t5":
        return {**T5, "d_kv": size, "num_heads": heads}
    return {**LLAMA, "head_dim": size, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


def is_built(bundle: Bundle, options: BuildOptions) -> bool:
    """Raises EngineError where something else than a kernel is missing."""
    try:
        build(bundle, options)
    except EngineError as error:
        if "was not supported by a dedicated kernel" not in str(error):
            raise
        return False
    return True


def bisected(bundle: Bundle, targets: tuple[str, ...], what: str) -> int:
    """The most rows that are built."""
    small = BuildOptions(targets=targets, capacity=64, prefill=8)

    def fits(rows: int) -> bool:
        return is_built(bundle, replace(small, capacity=rows) if what == "capacity" else replace(small, prefill=rows))

    assert fits(LEAST)
    assert not fits(MOST)
    return bisect.bisect_left(range(MOST), True, LEAST, MOST, key=lambda rows: not fits(rows)) - 1


def main() -> None:
    out, rows = Path(sys.argv[1]), []
    for model, size, heads, kv_heads, dtype, targets, what in CASES:
        with tempfile.TemporaryDirectory() as name, mock.patch.object(plan, "_check_rows"):
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(config(model, size, heads, kv_heads)))
            options = ExportOptions((kv_heads,), patterns=("attention",), dtype=dtype, cache="static")
            bundle = export(open_source(folder / "config.json"), folder / "bundle", options)
            built = bisected(bundle, targets, what)
        case = {"model": model, "head_size": size, "heads": f"{heads}:{kv_heads}", "dtype": dtype, "targets": targets}
        allowed = fused_rows(bundle.variants[0])
        rows.append({**case, "what": what, "built": built, "allowed": allowed, "kept": built == allowed})
        print(rows[-1], flush=True)
    kept = all(row["kept"] for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "fused rows", PROMISE, rows, kept)


if __name__ == "__main__":
    main()
