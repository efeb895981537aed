"""A conversion on tokens takes the memory of a layer, not of a model: a process of its own, a sparse checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from exporter.checkpoint import expected_shapes
from exporter.checkpoint.hf_config import parse_config
from profiles.benchmarks.export import LLAMA_8B, write_sparse

SHAPE = {**LLAMA_8B, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 16384}  # fmt: skip
SCRIPT = """
import json, resource, sys
from pathlib import Path
from exporter.convert import calibration, convert_checkpoint
calibration.WINDOWS, calibration.WINDOW = 2, 64

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder = Path(sys.argv[1])
convert_checkpoint(folder / "small", folder / "first", 2, "optimal", calibration="random")  # what is loaded once is loaded
before, seen = peak(), []
note = lambda *report: seen.append(report)
convert_checkpoint(folder / "large", folder / "out", 2, "optimal", progress=note, calibration="random")
print(json.dumps({"bytes": peak() - before, "seen": seen}))
"""


def test_the_memory_of_a_conversion_does_not_grow_with_depth(tmp_path: Path) -> None:
    write_sparse(tmp_path / "small", {**SHAPE, "num_hidden_layers": 2})
    write_sparse(tmp_path / "large", SHAPE)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    values = sum(rows * columns for rows, *rest in expected_shapes(parse_config(SHAPE)).values() for columns in rest or [1])
    assert values * 2 > 70e6  # bytes of the checkpoint, in fp16
    assert found["bytes"] < 15e6
    assert ["converting layers", 9, 16] in found["seen"]
    assert found["seen"][-1][0] == "writing weights"
    assert found["seen"][-1][1] == found["seen"][-1][2]
