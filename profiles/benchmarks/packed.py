"""One product for gate and value of a gated FFN, or one each: what ONNX Runtime's CPU takes for them, in turns.

d 1024, d_ff 2816, six layers with weights of their own so that they come from memory, SwiGLU, fp32, random weights. Packed,
[W_gate; W_up] is one matrix whose product is split; apart, they are two, as headpool exports them. (The pattern `fused` reads
both in one operator.)

Claim that decides how FFNs are exported: packed is not measurably faster (the 95 % interval of the ratio reaches 1), neither in
a decode step (1 token) nor in prefill (256).

    python -m profiles.benchmarks.packed OUT.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporter.engines.cores import physical_cores
from exporter.files import refuse_existing
from profiles import stats
from profiles.benchmarks.record import save

HIDDEN, WIDTH, LAYERS = 1024, 2816, 6
TOKENS = (1, 256)
ROUNDS, BURST = 24, 4
PROMISE = "one product for gate and value is not measurably faster than two"


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(HIDDEN, 2 * WIDTH, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split(WIDTH, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Step:
    """One graph of LAYERS such FFNs, and its samples by number of tokens."""

    def __init__(self, kind: type[nn.Module], folder: Path) -> None:
        import onnxruntime

        torch.manual_seed(0)
        path = folder / f"{kind.__name__}.onnx"
        layers = nn.Sequential(*(kind() for _ in range(LAYERS))).eval()
        dynamic = ({0: torch.export.Dim("tokens", min=1)},)
        torch.onnx.export(layers, (torch.ones(3, HIDDEN),), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.samples: dict[int, list[float]] = {tokens: [] for tokens in TOKENS}

    def run(self, x: np.ndarray, keep: bool) -> None:
        feeds = {self.session.get_inputs()[0].name: x}
        start = time.perf_counter()
        self.session.run(None, feeds)
        if keep:
            self.samples[len(x)].append(time.perf_counter() - start)


def measure() -> list[dict[str, Any]]:
    """A row for each number of tokens: milliseconds of both, and packed / apart with its 95 % interval."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        steps = {kind.__name__.lower(): Step(kind, Path(folder)) for kind in (Apart, Packed)}
        for tokens in TOKENS:
            x = rng.standard_normal((tokens, HIDDEN), dtype=np.float32)
            for round_ in range(ROUNDS + 1):
                for step in list(steps.values())[:: 1 if round_ % 2 else -1]:
                    step.run(x, keep=False)  # untimed: brings back what the other pushed out
                    for _ in range(BURST):
                        step.run(x, keep=round_ > 0)
    rows = []
    for tokens in TOKENS:
        apart, packed = (steps[name].samples[tokens] for name in ("apart", "packed"))
        low, high = stats.ratio_interval(packed, apart, block=BURST)
        row = {"tokens": tokens, "apart_ms": 1e3 * stats.median(apart), "packed_ms": 1e3 * stats.median(packed)}
        rows.append({**row, "ratio": stats.median(packed) / stats.median(apart), "low": low, "high": high})
    return rows


def main() -> None:
    out = Path(sys.argv[1])
    refuse_existing(out)
    rows = measure()
    for row in rows:
        print(
            f"{row['tokens']:>3} tokens: apart {row['apart_ms']:.2f} ms, packed {row['packed_ms']:.2f} ms, "
            f"{row['ratio']:.3f} × ({row['low']:.3f} … {row['high']:.3f})"
        )
    kept = all(row["high"] >= 1 for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "packed", PROMISE, rows, kept, hidden=HIDDEN, d_ff=WIDTH, layers=LAYERS, threads=physical_cores())


if __name__ == "__main__":
    main()
