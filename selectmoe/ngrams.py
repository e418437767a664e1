"""Words of texts and their n-grams: what near-duplicates and decontamination compare.

No command runs this module. Two texts that differ in case, punctuation, blanks or Unicode's compatibility forms have the
same words. In scripts that are written without blanks (Chinese, Japanese, Thai ...) and in Hangul every character is a
word: 13 of them are a shorter text than 13 English words.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from selectmoe.pool import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
"""Combining marks and the Indic blocks: parts of words that Python's \\w does not know as such."""
SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003fffd"  # kana, Han, Hangul
)
WORD = re.compile(f"[{SINGLE}]|(?:[^\\W{SINGLE}]|[{MARKS}])+")
ASCII_WORD = re.compile(r"\w+", re.ASCII)
MIX, FINAL = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD
"""Odd multipliers of the hash of an n-gram: part of the results' identity, since near-duplicates are found by them."""


def words(text: str) -> list[str]:
    """The words of a text, in their order, in one spelling."""
    if text.isascii():  # the same, in half the time
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def row_words(messages: Sequence[Message]) -> list[str]:
    """The words of a row: of all its messages, in their order."""
    return words("\n".join(m["content"] for m in messages))


def windows(codes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of every n consecutive codes.

    Args:
        codes: one number per word [W].
        n: words per n-gram, at most W.

    Returns:
        [W - n + 1].
    """
    return next(hashes for _, hashes in windows_of(codes, [n]))


def windows_of(codes: NDArray[np.uint64], lengths: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Every length, ascending, with what `windows` gives for it; lengths over the number of codes are left out."""
    import numpy as np

    mix = np.uint64(MIX)
    out = np.zeros_like(codes)
    for length in range(1, min(len(codes), max(lengths, default=0)) + 1):
        out = out[: len(codes) - length + 1] * mix + codes[length - 1 :]
        if length in lengths:
            found = out ^ (out >> np.uint64(32))
            found *= np.uint64(FINAL)
            yield length, found ^ (found >> np.uint64(32))


def word_codes(found: Sequence[str]) -> NDArray[np.uint64]:
    """CRC-32 of every word: the same on every machine, in every process."""
    import numpy as np

    return np.fromiter((zlib.crc32(word.encode()) for word in found), np.uint64, len(found))
