"""Text from llama.cpp, greedily, as `headpool run --json` reports its own.

    python -m profiles.peers.with_llama_cpp_text MODEL COUNT THREADS FLASH < PROMPT

MODEL is a folder that with_llama_cpp.export has made, FLASH 0 or 1; all else is as llama.cpp has it where nothing is asked for.
A time is of a token's decode call and its choice, as there; end tokens are tokens like others.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from profiles.peers.with_llama_cpp import Peer


def main(model: Path, count: int, threads: int, flash: bool, prompt: bytes) -> dict[str, Any]:
    peer = Peer(model, 1, len(prompt) + 1 + count, threads, flash, cache="f16")  # a token is a byte at least
    ids = _tokens(peer, prompt)
    made, seconds = [], []
    start = time.perf_counter()
    logits = peer.feed(ids[None])
    while True:
        made.append(int(logits[0].argmax()))
        seconds.append(time.perf_counter() - start)
        if len(made) == count:
            break
        start = time.perf_counter()
        logits = peer.feed(np.array([made[-1:]]))
    return {
        "prompt_tokens": [len(ids)],
        "tokens": [made],
        "texts": [b"".join(_piece(peer, token) for token in made).decode("utf-8", "replace")],
        "time_to_first_token_seconds": seconds[0],
        "seconds_per_token_p50": float(np.median(seconds[1:])),
    }


def _tokens(peer: Peer, text: bytes) -> np.ndarray:
    room = (peer.c.llama_token * (len(text) + 1))()
    count = peer.c.llama_tokenize(peer.words, text, len(text), room, len(room), True, False)
    return np.array(room[:count], np.int64)


def _piece(peer: Peer, token: int) -> bytes:
    room = ctypes.create_string_buffer(256)
    size = peer.c.llama_token_to_piece(peer.words, token, room, len(room), 0, False)
    return room.raw[:size]


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    amount, cores, fused = map(int, numbers)
    print(json.dumps(main(Path(folder), amount, cores, bool(fused), sys.stdin.buffer.read())))
