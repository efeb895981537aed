"""Tokens a second of `headpool run` on a real model's int4 bundle beside llama.cpp's Q4_0 of the same model, on the same text.

Promise: `headpool run` makes at least as many tokens a second as llama.cpp, the faster of it with and without flash attention.

The bundle is `headpool export MODEL.gguf --quantize int4 --pattern fused`; Q4_0 is what llama.cpp's own quantiser makes of the
same file. Each turn is a process of each, one after the other with the same number of threads, forwards and backwards by turns:
open, read the prompt, choose COUNT tokens greedily, say what a token took (p50). But for threads each is as it comes: our cache
in fp32, llama.cpp's in fp16. `times` is the median over the turns of the ratio within a turn, with its 95 % interval.

    python -m profiles.benchmarks.text OUT.json MODEL.gguf      after scripts/peers, which makes llama.cpp's environment
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle
from exporter.checkpoint import open_source
from exporter.engines.cores import physical_cores
from exporter.errors import EngineError
from exporter.evaluate import default_text
from exporter.files import refuse_existing
from exporter.tokenizer import Tokenizer
from profiles import stats
from profiles.benchmarks.process import headpool
from profiles.benchmarks.record import save
from profiles.bundles import subject_of
from profiles.machine import ROOT
from profiles.peers.runtimes import RUNTIMES, Place, Runtime

LENGTHS = (64, 1024)  # tokens of the prompts
COUNT = 128  # new tokens
TURNS = 10
OWN, OTHERS = "headpool", ("llama.cpp", "llama.cpp, flash attention")
PROMISE = (
    "`headpool run` makes at least as many tokens a second as llama.cpp, the faster of it with and without flash attention"
)

Report = dict[str, Any]  # what `headpool run --json` says
Way = Callable[[str], Report]


def in_headpool(bundle: Path, threads: int, count: int, prompt: str) -> Report:
    words = ("--prompt", prompt, "--max-new-tokens", str(count), "--threads", str(threads), "--json")
    report: Report = json.loads(headpool("run", str(bundle), *words).output.splitlines()[-1])
    return report


def in_llama_cpp(model: Path, threads: int, flash: bool, count: int, prompt: str) -> Report:
    words = [_llama_cpp().python, "-m", "profiles.peers.with_llama_cpp_text", model, count, threads, int(flash)]
    done = subprocess.run(list(map(str, words)), input=prompt.encode(), capture_output=True, cwd=ROOT)
    if done.returncode:
        raise EngineError(f"llama.cpp ended with status {done.returncode}: {done.stderr.decode('utf-8', 'replace')[-300:]}")
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


def quantised(source: Path, folder: Path, threads: int) -> tuple[Path, int]:
    """llama.cpp's Q4_0 of the GGUF file `source`, and the bytes of its weights."""
    import gguf

    worker = _llama_cpp().start(Place(folder, threads))
    try:
        worker.ask("export", checkpoint=str(source), out=str(folder / "llama.cpp"), weights="int4")
    finally:
        worker.close()
    tensors = gguf.GGUFReader(folder / "llama.cpp" / "model.gguf").tensors
    return folder / "llama.cpp", sum(int(tensor.n_bytes) for tensor in tensors)


def in_turns(ways: dict[str, Way], prompt: str, count: int, turns: int) -> dict[str, Any]:
    """A row: of every way the p50 of each turn in ms, the first token's, and the text; and how often as fast `OWN` is."""
    reports: dict[str, list[Report]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways) if turn % 2 == 0 else list(reversed(ways)):
            reports[name].append(ways[name](prompt))
    made = {
        name: {(report["prompt_tokens"][0], len(report["tokens"][0])) for report in found} for name, found in reports.items()
    }
    [(length, new)] = made[OWN]
    if any(pairs != {(length, count)} for pairs in made.values()):
        raise EngineError(f"not all read {length} tokens and made {count}, (read, made) are {made}; choose another text")
    ms = {name: [report["seconds_per_token_p50"] * 1e3 for report in found] for name, found in reports.items()}
    best = min((name for name in ways if name != OWN), key=lambda name: stats.median(ms[name]))
    ratios = [other / own for other, own in zip(ms[best], ms[OWN], strict=True)]
    low, high = stats.median_interval(ratios)
    return {
        "prompt_tokens": length,
        "new_tokens": new,
        "ms": ms,
        "tokens_per_second": {name: 1e3 / stats.median(taken) for name, taken in ms.items()},
        "first_token_ms": {
            name: stats.median([report["time_to_first_token_seconds"] * 1e3 for report in found])
            for name, found in reports.items()
        },
        "beside": best,
        "times": stats.median(ratios),
        "low": low,
        "high": high,
        "texts": {name: found[0]["texts"][0] for name, found in reports.items()},
    }


def main(
    out: Path,
    model: Path,
    lengths: tuple[int, ...] = LENGTHS,
    count: int = COUNT,
    turns: int = TURNS,
    threads: int | None = None,
) -> None:
    """Measure, print a line a row, and write `out`."""
    refuse_existing(out)
    threads = threads or physical_cores()
    tokenizer = Tokenizer.from_files(open_source(model).side_files, str(model))
    text = tokenizer.encode(default_text(), special=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        headpool("export", str(model), str(folder / "bundle"), "--quantize", "int4", "--pattern", "fused")
        bundle = Bundle.open(folder / "bundle")
        file, size = quantised(model, folder, threads)
        weights = {OWN: subject_of(bundle, bundle.variants[0]).weight_bytes, **dict.fromkeys(OTHERS, size)}
        ways: dict[str, Way] = {OWN: partial(in_headpool, bundle.path, threads, count)}
        ways |= {other: partial(in_llama_cpp, file, threads, bool(flash), count) for flash, other in enumerate(OTHERS)}
        rows = [in_turns(ways, tokenizer.decode(text[:length]), count, turns) for length in lengths]
    for row in rows:
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in row["tokens_per_second"].items())
        ratio = f"{row['times']:.3f} × ({row['low']:.3f} to {row['high']:.3f})"
        print(f"after {row['prompt_tokens']} tokens, tokens/s: {speeds}; {ratio} {row['beside']}")
    kept = all(row["times"] >= 1 for row in rows)
    print(f"kept: {kept} ({PROMISE})")
    save(out, "text", PROMISE, rows, kept, model=model.name, threads=threads, turns=turns, weight_bytes=weights)


def _llama_cpp() -> Runtime:
    return next(runtime for runtime in RUNTIMES if runtime.name == OTHERS[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
