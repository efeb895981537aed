"""JSON values back to typed dataclasses, strictly: an unknown, missing or mistyped key is an error that names its place."""

from __future__ import annotations

import functools
import json
import math
from typing import Any, NoReturn, TypeVar

from exporter.errors import UserError

T = TypeVar("T")
MAX_INT = 2**63


def parse(text: str) -> Any:
    """JSON text as Python values.

    Raises ValueError, also for an empty text, NaN, infinity, numbers of more than 64 bits, too deep a nesting and what is no
    Unicode.
    """
    if not text.strip():
        raise ValueError("it is empty")
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    json.dumps(data, ensure_ascii=False).encode()  # an escaped lone surrogate could never be printed again
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > len(str(-MAX_INT)) or abs(int(text)) >= MAX_INT:
        raise ValueError(f"{text[:40]} is too large")
    return int(text)


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, parsed JSON, as `kind`: a dataclass, or any other type that pydantic knows, by its strict rules for JSON.

    Numbers, texts and booleans are not taken for each other, but for a whole number where a float is due. Raises UserError:
    what a dataclass's own checks raise, or one line on the first value that does not fit. `where` is the name of `value`.
    """
    import pydantic  # 0.1 s that only commands which read a manifest or results pay

    adapter: Any = _adapter(kind)  # type: ignore[arg-type]
    try:
        return adapter.validate_json(json.dumps([value]))[0]
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        cause = problems[0].get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(" ".join(_complaint(problems, value, where).split())) from None


def _complaint(problems: list[Any], value: Any, where: str) -> str:
    first, message = problems[0], problems[0]["msg"]
    for key in first["loc"][1:]:
        try:
            value = value[key]
        except (TypeError, LookupError):  # a key that is missing, or the name of a union's member
            break
        where += f"[{key}]" if isinstance(key, int) else f".{key:.40}"
    if first["type"] == "missing":
        return f"{where} lacks {', '.join(item['loc'][-1] for item in problems if item['type'] == 'missing')}"
    if first["type"] == "unexpected_keyword_argument":
        return f"{where} is an unknown key"
    return f"{where} is {value!r:.60}: {message[0].lower()}{message[1:]}"


@functools.cache
def _adapter(kind: Any) -> Any:
    """A list around it, since pydantic takes no config from outside for a dataclass itself."""
    import pydantic

    return pydantic.TypeAdapter(list[kind], config=pydantic.ConfigDict(strict=True, extra="forbid"))
