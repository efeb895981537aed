"""The forms that the rows of a cache may be stored in where that is not the dtype of the activations.

fp16  [B,G,S,D] halves, rounded to the nearest.
int8  [B,G,S,D+4] bytes: of each row D values from −127 to 127, and then their scale as four bytes of an fp32 number: the row's
      largest magnitude / 127, one for each token and KV head. A value is q · scale, q rounded to the nearest, of two the even
      one. What is not finite makes the scale NaN; a row of zeros stays one, and so does one whose scale would be below 2⁻¹²⁶.
"""

from __future__ import annotations

CACHES = ("fp16", "int8")
SCALE_BYTES = 4


def row_width(size: int, dtype: str) -> int:
    """Elements of a row of `size` channels in a cache of `dtype`, any that a cache can have."""
    return size + SCALE_BYTES if dtype == "int8" else size
