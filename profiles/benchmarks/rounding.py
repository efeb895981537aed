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
from profiles.benchmarks.record import Rows, save

PIECES, LENGTH = 16, 256  # predicted tokens of a piece
NEAREST, GPTQ = "to the nearest", "by GPTQ"
FOUR = tuple(kind for kind in QUANTIZE if kind.startswith("int4"))
CASES = [(None, NEAREST), ("int8", NEAREST), *((kind, how) for kind in FOUR for how in (NEAREST, GPTQ))]
PLAIN, SHARE, ERRORS = ("int4", "int4-128"), 2 / 3, 3
PROMISE = (
    f"by GPTQ {' and '.join(PLAIN)} add at most {SHARE:.2f} of what they add rounded to the nearest, and less by {ERRORS} "
    "standard errors"
)


def measure(checkpoint: Checkpoint, rows: Rows, pieces: int = PIECES, length: int = LENGTH) -> list[dict[str, Any]]:
    """Adds what `rows` lack, one each form and way to round, and gives them as `summary` does."""
    text = default_text()
    tokens = Tokenizer.from_files(checkpoint.side_files, checkpoint.name).encode(text[: 8 * pieces * length], special=False)
    windows = np.stack([tokens[start : start + length + 1] for start in range(0, pieces * length, length)])
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        calibration = Path(folder) / "text"
        calibration.write_text(text[len(text) // 5 :], "utf-8")
        for number, (kind, how) in enumerate(CASES):
            row: dict[str, Any] = {"what": "loss", "weights": kind or "fp32", "rounded": how}
            if rows.find(row) is None:
                options = ExportOptions(
                    patterns=("fused",), quantize=kind, calibration=str(calibration) if how == GPTQ else None
                )
                bundle = export(checkpoint, Path(folder) / str(number), options, progress)
                with open_session(bundle, batch=pieces, capacity=length) as session:
                    found = losses(session, windows)
                rows.add({**row, "weight_bytes": bundle.variants[0].weight_bytes, "pieces": found.tolist()})
    return summary(rows.rows)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their mean, nats a token, what of it is added to fp32's, and the standard error of that."""
    exact = np.array(rows[0]["pieces"])
    made = []
    for row in rows:
        found = np.array(row["pieces"])
        mean, error = _difference(found, exact)
        made.append({**row, "nats_per_token": float(found.mean()), "added": mean, "error": error})
    return made


def _difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error, piece by piece."""
    difference = one - other
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


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
    """Of rows that `summary` gave."""
    found = {(row["weights"], row["rounded"]): row for row in rows if row["what"] == "loss"}
    for kind in PLAIN:
        theirs, ours = found[kind, NEAREST], found[kind, GPTQ]
        less, error = _difference(np.array(theirs["pieces"]), np.array(ours["pieces"]))
        if ours["added"] > SHARE * theirs["added"] or less <= ERRORS * error:
            return False
    return True


def main(out: Path, model: Path, pieces: int = PIECES, length: int = LENGTH) -> None:
    """Measure, print a line a row, and write `out`. A run that was stopped goes on."""
    refuse_existing(out)
    checkpoint, rows = open_source(model), Rows(out.with_name(out.name + ".rows"))
    made = measure(checkpoint, rows, pieces, length)
    for row in made:
        what = f"{row['weights']:12} {row['rounded']:15} {row['added']:+.4f} ± {row['error']:.4f} nats"
        print(f"{what}, {row['weight_bytes']:,} bytes")
    kept = is_kept(made)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "rounding", PROMISE, made, kept, model=checkpoint.name, tokens_a_piece=length)
    rows.path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
