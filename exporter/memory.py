"""The process's own memory, as the C library keeps it."""

from __future__ import annotations

import contextlib
import ctypes


def give_memory_back() -> None:
    """Freed memory goes back to the system. glibc keeps freed blocks of up to 32 MB that lie between others in use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)
