"""JSON files with any value in place of any other, and what the runtime says of them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from capi import Api, RuntimeFailure

VALUES: list[Any] = [None, -1, 0, 1, 2, 2**31, 2**63, 1.5, "", [], {}, True]
ROUNDS = 300


def statuses(
    api: Api, bundle: Path, file: Path, values: list[Any], part: Callable[[Any], Any] = lambda data: data, **opening: Any
) -> list[int]:
    """Of each of ROUNDS damaged copies of `file` (in its `part`, one or two values): 0 when a token could be computed."""
    generator = random.Random(3)
    original = json.loads(file.read_text())
    found = []
    for _ in range(ROUNDS):
        data = copy.deepcopy(original)
        places = list(_places(part(data)))
        for _ in range(generator.choice((1, 1, 2))):
            holder, key = generator.choice(places)
            holder[key] = generator.choice(VALUES + values)
        file.write_text(json.dumps(data))
        found.append(_status(api, bundle, opening))
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _status(api: Api, bundle: Path, opening: dict[str, Any]) -> int:
    try:
        model = api.open(bundle, **opening)
        session = model.session(capacity=8)
        session.prefill([np.array([1, 2])])
    except RuntimeFailure as failure:
        return failure.status
    session.close()
    model.close()
    return 0
