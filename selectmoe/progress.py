"""Progress on stderr: a bar where it is a terminal, a plain line every ten seconds where it is not.

No command runs this module.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 10.0
"""Seconds between two plain lines."""


def progress(iterable: Iterable[T], desc: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield the items and show how far it is.

    Args:
        iterable: what to go through.
        desc: what is being done.
        total: number of items where `iterable` has no length.
        unit: what an item is.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=desc, total=total, unit=unit, file=sys.stderr)
        return
    start = last = time.monotonic()
    for n, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= INTERVAL:
            last = now
            rate = n / (now - start)
            left = f", {(total - n) / rate:.0f} s left" if total and rate else ""
            print(
                f"{desc}: {n}/{total if total is not None else '?'} {unit}, {rate:.2f} {unit}/s{left}", file=sys.stderr
            )
