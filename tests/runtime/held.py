"""What this process holds in memory after each model and session it makes, bytes as JSON: held.py LIBRARY BUNDLE VARIANT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from capi import Api, Model


def resident() -> int:
    """Memory of its own and pages of files alike."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def main(library: str, bundle: str, variant: str) -> None:
    api, kept, bytes_held = Api(Path(library)), [], {}

    def note(name: str) -> None:
        bytes_held[name] = resident()

    def begin(model: Model) -> None:
        kept.append(model.session(capacity=64))
        kept[-1].prefill([np.arange(20)])
        kept[-1].decode(np.array([1]))

    note("nothing")
    models = [api.open(Path(bundle), variant)]
    begin(models[0])
    note("a session")
    begin(models[0])
    note("another session")
    models.append(api.open(Path(bundle), variant))
    begin(models[1])
    note("another model")
    print(json.dumps(bytes_held))


if __name__ == "__main__":
    main(*sys.argv[1:])
