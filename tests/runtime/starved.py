"""How a process ends whose memory has a limit: starved.py LIBRARY BUNDLE VARIANT MB…

As JSON: 0, the status of what failed, 99 for any other exception, or minus the number of a signal; first with so few MB that
ONNX Runtime cannot begin, then, where it has begun, with each of those given.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from capi import Api, RuntimeFailure

PROMPTS = [np.arange(30), np.arange(4)]


def attempt(api: Api, bundle: str, variant: str, mb: float) -> int:
    """In a process of its own, which may take so much more than this one has."""
    if (child := os.fork()) == 0:
        pages, code = int(Path("/proc/self/statm").read_text().split()[0]), 99
        most = pages * resource.getpagesize() + int(mb * 1_000_000)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            api.open(Path(bundle), variant, threads=2).session(batch=2, capacity=60).prefill(PROMPTS)
            code = 0
        except RuntimeFailure as failure:
            code = failure.status
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def begin(api: Api, bundle: Path) -> None:
    """ONNX Runtime's environment, without a session and its threads, which a fork would not have."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(bundle / "headpool.json", folder)
        with contextlib.suppress(RuntimeFailure):
            api.open(Path(folder))


if __name__ == "__main__":
    library, bundle, variant, *sizes = sys.argv[1:]
    api = Api(Path(library))
    ends = [attempt(api, bundle, variant, 6)]
    begin(api, Path(bundle))
    print(json.dumps(ends + [attempt(api, bundle, variant, float(mb)) for mb in sizes]))
