"""How a process ends whose memory has a limit, one for each MB of it: starved.py LIBRARY BUNDLE VARIANT MB…

As JSON: 0, the status of what failed, 99 for any other exception, or minus the number of a signal.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np
from capi import Api, RuntimeFailure

PROMPTS = [np.arange(30), np.arange(4)]


def attempt(api: Api, bundle: str, variant: str, mb: int) -> int:
    """In a process of its own, which may take so much more than this one has.

    In a thread of it, whose stack has all its addresses from the start: where that of the main thread cannot grow within the
    limit, the kernel ends the process (getrlimit(2)), which is nobody's to report.
    """

    def work() -> None:
        pages, code = int(Path("/proc/self/statm").read_text().split()[0]), 99
        most = pages * resource.getpagesize() + mb * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            api.open(Path(bundle), variant, threads=2).session(batch=2, capacity=60).prefill(PROMPTS)
            code = 0
        except RuntimeFailure as failure:
            code = failure.status
        finally:
            os._exit(code)

    if (child := os.fork()) == 0:
        threading.Thread(target=work).start()
        threading.Event().wait()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    library, bundle, variant, *sizes = sys.argv[1:]
    api = Api(Path(library))
    print(json.dumps([attempt(api, bundle, variant, int(mb)) for mb in sizes]))
