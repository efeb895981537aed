"""JSON values back to typed dataclasses, strictly: an unknown, missing or mistyped key is an error that names its place."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, NoReturn, TypeVar

from exporter.errors import UserError, one_of

T = TypeVar("T")
MAX_INT = 2**63
JSON_TYPES: dict[Any, Any] = {
    bool: bool,
    int: int,
    float: (int, float),
    str: str,
    types.NoneType: types.NoneType,
    tuple: list,
    dict: dict,
}


def parse(text: str) -> Any:
    """JSON text as Python values. Raises ValueError, also for NaN, infinity, too deep a nesting and what is no Unicode."""
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite)
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


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, parsed JSON, as `kind`: a dataclass, bool, int, float, str, None, Any, Literal, tuple[X, ...], dict[str, X] or a
    union of them.

    Numbers are not taken for each other, but for a whole number where a float is due. Raises UserError.
    """
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(one_of(where, value, arguments))
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key:.40}") for key, item in value.items()}
    if kind is types.NoneType and value is None:
        return None
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_INT:
        return kind(value)
    if kind in (bool, float, str) and isinstance(value, kind):
        return value
    raise UserError(f"{where} is {value!r:.60}, not {_name(kind)}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r:.60}, not an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise UserError(f"{where} has the unknown key {unknown[0]!r:.60}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise UserError(f"{where} lacks {', '.join(missing)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    """The choice whose JSON type fits; its own error where the content does not."""
    for choice in choices:
        json_type = dict if dataclasses.is_dataclass(choice) else JSON_TYPES[typing.get_origin(choice) or choice]
        if isinstance(value, json_type):
            return _decode(choice, value, where)
    raise UserError(f"{where} is {value!r:.60}, not {' or '.join(map(_name, choices))}")


def _name(kind: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        types.NoneType: "null",
        tuple: "a list",
        dict: "an object",
    }
    return names.get(typing.get_origin(kind) or kind, "an object")
