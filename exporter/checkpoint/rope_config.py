"""RoPE in config.json: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (transformers 5) → RopeConfig.

The meaning of each key, and what stands in for a missing one, is that of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporter.checkpoint.families import Family
from exporter.config import RopeConfig
from exporter.errors import UserError, one_of

KNOWN = {
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
}


def parse_rope(hf: Mapping[str, Any], family: Family, max_positions: int) -> RopeConfig:
    """Raises UserError for a scaling that is unknown, that the family does not have, or that lacks a number."""
    values = _parameters(hf)
    kind = values["rope_type"]
    if kind not in family.rope_kinds:
        raise UserError(one_of("RoPE scaling", kind, family.rope_kinds))
    if unknown := sorted(set(values) - KNOWN):
        raise UserError(f"RoPE parameters {', '.join(unknown)} are not supported")
    fraction = _number(values, "partial_rotary_factor", 1.0)
    if fraction != 1.0 and not family.partial_rotary:
        raise UserError(f"partial_rotary_factor {fraction} is not part of {family.model_type}")
    theta = _number(values, "rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta, fraction=fraction)
    if kind == "linear":
        return RopeConfig("linear", theta, fraction, _number(values, "factor"))
    # A top-level original_max_position_embeddings comes before the one among the parameters.
    original = hf.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or max_positions
    if type(original) is not int:
        raise UserError(f"original_max_position_embeddings {original!r} is not a whole number")
    if kind == "llama3":
        low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
        if not high > low:
            raise UserError(f"high_freq_factor {high} is not above low_freq_factor {low}")
        return RopeConfig(kind, theta, fraction, _number(values, "factor"), low, high, original)
    factor = _number(values, "factor", max_positions / original)
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    truncate = given.get("truncate", True)  # null is false
    if truncate not in (True, False, None) or type(truncate) in (int, float):
        raise UserError(f"RoPE truncate {truncate!r} is not true or false")
    return RopeConfig(
        kind,
        theta,
        fraction,
        factor,
        original_max_positions=original,
        beta_fast=_number(values, "beta_fast", 32.0) or 32.0,
        beta_slow=_number(values, "beta_slow", 1.0) or 1.0,
        truncate=bool(truncate),
        attention_factor=_attention_factor(values, factor),
    )


def rope_keys(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same RoPE in the keys of transformers 4 and 5 alike, so that either reads the config right."""
    values = _parameters(hf)
    keys = {"rope_theta": values["rope_theta"], "rope_parameters": values}
    if "partial_rotary_factor" in values:
        keys["partial_rotary_factor"] = values["partial_rotary_factor"]
    scaling = {key: value for key, value in values.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {**keys, "rope_scaling": None if values["rope_type"] == "default" else scaling}


def _parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"RoPE parameters {given!r} are not a JSON object")
    values = {key: value for key, value in given.items() if value is not None}
    values["rope_type"] = values.get("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", None)):
        value = values.get(key, hf.get(key))
        if value is not None or default is not None:
            values[key] = default if value is None else value
    return values


def _attention_factor(values: Mapping[str, Any], factor: float) -> float | None:
    """yarn's factor on cos and sin; None where it is the paper's own."""
    if "attention_factor" in values:
        return _number(values, "attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = _number(values, "mscale", 0.0), _number(values, "mscale_all_dim", 0.0)
    if above and below:
        return mscale(above) / mscale(below)
    return None if factor > 1 else 1.0


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if value is None:
        raise UserError(f"RoPE scaling {values['rope_type']} needs {key}")
    if (number := finite(value)) is None:
        raise UserError(f"RoPE {key} {value!r} is not a finite number")
    return number


def finite(value: object) -> float | None:
    """A JSON number as a float; None for everything else, also for numbers that no float holds."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
