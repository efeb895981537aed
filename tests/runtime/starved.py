"""How a process ends whose memory has a limit, one for each MB of it: starved.py LIBRARY BUNDLE VARIANT MB…

As JSON: "ok", the status of what failed, or "signal" and its number.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
from capi import Api, RuntimeFailure


def attempt(api: Api, bundle: str, variant: str, mb: int) -> str:
    """In a process of its own, which may take so much more than this one has."""
    if (child := os.fork()) == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + mb * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            api.open(Path(bundle), variant, threads=2).session(batch=2, capacity=60).prefill([np.arange(30), np.arange(4)])
        except RuntimeFailure as failure:
            os._exit(failure.status)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else str(code) if code else "ok"


if __name__ == "__main__":
    library, bundle, variant, *sizes = sys.argv[1:]
    api = Api(Path(library))
    print(json.dumps([attempt(api, bundle, variant, int(mb)) for mb in sizes]))
