"""What int8 and int4 weights cost SmolLM2, in every form, rounded to the nearest and by GPTQ on text.

The loss is cross-entropy on the first part of Python's language reference, in pieces that each start from an empty cache, as
`fused` computes it a token at a time. GPTQ is calibrated on the rest of that text, which begins far behind the last piece.
Every row is compared with fp32 piece by piece; its error is the standard error of that difference.

SmolLM2 comes as Q4_1, 4 bits and a minimum in blocks of 32: what int4-zp, which is nearly that, costs it says little of others.

Promise: in blocks without zero points GPTQ takes a third off what int4 rounded to the nearest adds to the loss, and more than
three standard errors.

    python -m profiles.benchmarks.rounding OUT.json MODEL.gguf
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint, open_source
from exporter.cli.console import progress_bar
from exporter.engines import open_session
from exporter.engines.base import Session
from exporter.evaluate import default_text
from exporter.export import ExportOptions, export
from exporter.files import refuse_existing
from exporter.quantise import QUANTIZE
from exporter.tokenizer import Tokenizer
from profiles.benchmarks.record import save

PIECES, LENGTH = 16, 256  # predicted tokens of a piece
PLAIN, SHARE, ERRORS = ("int4", "int4-128"), 2 / 3, 3
PROMISE = (
    f"by GPTQ {' and '.join(PLAIN)} add at most {SHARE:.2f} of what they add rounded to the nearest, and less by {ERRORS} "
    "standard errors"
)


def rows_of(checkpoint: Checkpoint, pieces: int = PIECES, length: int = LENGTH) -> list[dict[str, Any]]:
    """One row for fp32, and one each form and way to round: nats a token, what is added, bytes a decode step reads."""
    text = default_text()
    tokens = Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(text[: 8 * pieces * length], special=False)
    cut = tokens[: pieces * length + 1]
    windows = np.stack([cut[start : start + length + 1] for start in range(0, pieces * length, length)])
    rows, exact = [], np.zeros(pieces)
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        calibration = Path(folder) / "text"
        calibration.write_text(text[len(text) // 5 :], "utf-8")
        for kind in (None, *QUANTIZE):
            for source in (None, str(calibration)) if kind else (None,):
                options = ExportOptions(patterns=("fused",), quantize=kind, calibration=source)
                bundle = export(checkpoint, Path(folder) / f"{kind}-{bool(source)}", options, progress)
                with open_session(bundle, batch=pieces, capacity=length) as session:
                    found = losses(session, windows)
                exact = found if kind is None else exact
                error = float((found - exact).std(ddof=1) / np.sqrt(pieces))
                row: dict[str, Any] = {
                    "what": "loss",
                    "weights": kind or "fp32",
                    "rounded": "by GPTQ" if source else "to the nearest",
                }
                row |= {"nats_per_token": float(found.mean()), "added": float((found - exact).mean()), "error": error}
                rows.append({**row, "weight_bytes": bundle.variants[0].weight_bytes})
    return rows


def losses(session: Session, windows: np.ndarray) -> NDArray[np.float64]:
    """Windows int64 [n, length + 1] in a batch of n → nats a token of each, [n]; every token but the first is predicted."""
    total = np.zeros(len(windows))
    logits = session.prefill([window[:1] for window in windows])
    for at in range(1, windows.shape[1]):
        logits = logits.astype(np.float64)
        highest = logits.max(axis=1)
        total += (
            highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)) - logits[np.arange(len(windows)), windows[:, at]]
        )
        if at < windows.shape[1] - 1:
            logits = session.decode(windows[:, at])
    return total / (windows.shape[1] - 1)


def is_kept(rows: list[dict[str, Any]]) -> bool:
    added = {(row["weights"], row["rounded"]): (row["added"], row["error"]) for row in rows if row["what"] == "loss"}
    pairs = [(added[kind, "to the nearest"], added[kind, "by GPTQ"]) for kind in PLAIN]
    return all(
        ours <= SHARE * theirs and theirs - ours > ERRORS * float(np.hypot(error, other))
        for (theirs, error), (ours, other) in pairs
    )


def main(out: Path, model: Path, pieces: int = PIECES, length: int = LENGTH) -> None:
    """Measure, print a line a row, and write `out`."""
    refuse_existing(out)
    checkpoint = open_source(model)
    rows = rows_of(checkpoint, pieces, length)
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    kept = is_kept(rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "rounding", PROMISE, rows, kept, model=checkpoint.name, pieces=pieces, tokens_a_piece=length)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
