"""Progress on stderr: a bar where it is a terminal, a plain line every ten seconds where it is not.

No command runs this module. `quiet` silences the bars and advice of the libraries, so that a screen or a log holds what
our stages say.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 10.0
"""Seconds between two plain lines."""
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
