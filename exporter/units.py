"""Figures as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in decimal units, as bandwidth is in GB/s: "92.2 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
