"""Times as people read them, with no more digits than were measured. (Sizes: exporter/units.py.)"""

from __future__ import annotations

import math


def milliseconds(seconds: float) -> str:
    """Three or more significant digits: "0.512", "12.3", "1,234"."""
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def rounded(value: float, low: float, high: float) -> str:
    """`value` down to the first digit in which its interval `low` … `high` is uncertain, of three significant ones at most."""
    uncertain = math.floor(math.log10(half)) if (half := (high - low) / 2) > 0 else -9
    leading = math.floor(math.log10(abs(value))) if value else 0
    digit = min(max(uncertain, leading - 2), leading)
    return f"{round(value, -digit):,.{max(0, -digit)}f}"
