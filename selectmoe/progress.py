"""Progress on stderr: a bar where it is a terminal, a plain line every ten seconds where it is not.

No command runs this module. `quiet` silences the bars and advice of the libraries, so that a screen or a log holds what
our stages say.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from selectmoe.distributed import rank

T = TypeVar("T")

INTERVAL = 10.0
"""Seconds between two plain lines."""
LARGE = 64 << 20
"""Bytes from which on a transfer is worth a bar."""
LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that make the libraries silent; one that the user has set stays as it is."""
NOISY = r"(torch|transformers|peft|accelerate|datasets|huggingface_hub|lm_eval|sklearn|kfp|google|mlflow|gguf)\b"


def quiet() -> None:
    """Silence the libraries in this process and its children; called before any of them is imported."""
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:  # -W and PYTHONWARNINGS are obeyed
        warnings.filterwarnings("ignore", module=NOISY)


def progress(iterable: Iterable[T], desc: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield the items and show how far it is (of several processes, the first shows it).

    Args:
        iterable: what to go through.
        desc: what is being done.
        total: number of items where `iterable` has no length.
        unit: what an item is.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if rank():
        yield from iterable
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=desc, total=total, unit=unit, file=sys.stderr, disable=False)
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


@contextmanager
def transfer(desc: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a transfer of bytes is; nothing for a small one.

    Args:
        desc: what is moved.
        total: bytes to move.

    Yields:
        A function to be told how many bytes were moved since it was last told; threads may call it.
    """
    if total < LARGE:
        yield lambda moved: None
        return
    lock = threading.Lock()
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=desc, total=total, unit="B", unit_scale=True, file=sys.stderr, disable=False) as bar:

            def show(moved: int) -> None:
                with lock:
                    bar.update(moved)

            yield show
        return
    start = last = time.monotonic()
    done = 0

    def say(moved: int) -> None:
        nonlocal done, last
        with lock:
            done += moved
            now = time.monotonic()
            if now - last >= INTERVAL:
                last = now
                rate = done / (now - start)
                left = f", {(total - done) / rate:.0f} s left" if rate else ""
                print(f"{desc}: {done >> 20}/{total >> 20} MiB, {rate / 2**20:.1f} MiB/s{left}", file=sys.stderr)

    yield say
