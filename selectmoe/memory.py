"""Memory that is given back to the system when it is free.

No command runs this module; stages that hold large arrays for a while call it before they begin.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, LARGE = -3, 1 << 20
"""The number by which glibc's mallopt knows the size from which on memory is the system's own (malloc.h), and that size."""


def give_back() -> None:
    """Give large pieces of memory back to the system as soon as they are free, where the C library is glibc.

    It keeps them else, in heaps of every thread, and reuses few: half a gigabyte over some hundred batches that are
    prepared in one thread and computed in another (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
