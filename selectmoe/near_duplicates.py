"""Near-duplicates of a dataset: rows that say almost what an earlier row says, found by MinHash and proved by comparing.

    selectmoe ingest data=rows.jsonl near_duplicates.threshold=0.8 output_dir=out/ingest

Two rows are near-duplicates when the Jaccard similarity of their sets of word n-grams (`selectmoe.ngrams`) is at least
the threshold. Rows are gone through by the hash of their content (then by id): one that is a near-duplicate of a row that
was kept goes, and names it. So the outcome depends on the rows alone, never on their order or on the number of workers;
and on those of one dataset alone, so that a new dataset changes no other's.

Steps: sketch (in any process): n-grams -> hashes -> MinHash signature (datasketch) -> one key per band. Then, band by
band: rows that share a key are candidates, and candidates are compared by their n-grams themselves, read from a scratch
file. A pair at the threshold is missed with a probability of at most `MISSED`; no row goes that is not above it.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe.config import identity
from selectmoe.errors import UserError, unwritable
from selectmoe.ngrams import row_words, windows, word_codes
from selectmoe.pool import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PERMUTATIONS = 128
"""Values of a signature."""
SEED = 1
MISSED = 0.005
"""Probability with which a pair just at the threshold may share no band."""
MOST = 100
"""Kept rows of one band's key that a row is compared with, by content hash: what bounds the work where thousands of rows
share a long template and yet are no near-duplicates."""
LEAST_THRESHOLD = 0.3
BLOCK = 1 << 16
"""Rows whose keys are read at once."""


@dataclass
class NearDuplicatesConfig:
    """Rows that say almost what another row of their dataset says."""

    threshold: float = identity(
        0.0,
        doc="similarity (Jaccard, of word n-grams) from which on the later of two rows is dropped; 0: none, usual: 0.8",
    )
    ngram: int = identity(3, doc="words per n-gram; more: stricter, above all for short rows")

    def validate(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a value is out of its range.
        """
        if self.threshold and not LEAST_THRESHOLD <= self.threshold <= 1:
            raise UserError(f"near_duplicates.threshold={self.threshold} must be 0, or from {LEAST_THRESHOLD} to 1")
        if not 1 <= self.ngram <= 50:
            raise UserError(f"near_duplicates.ngram={self.ngram} must be from 1 to 50")


def bands_of(threshold: float) -> tuple[int, int]:
    """Number of bands and signature values per band: as many values as `MISSED` allows, since they save comparisons."""
    for width in range(16, 1, -1):
        bands = PERMUTATIONS // width
        if (1 - threshold**width) ** bands <= MISSED:
            return bands, width
    return PERMUTATIONS, 1


@functools.cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme="affine32").permutations


def sketch(messages: Sequence[Message], config: NearDuplicatesConfig) -> bytes:
    """What is compared of a row: little-endian, its bands' keys (uint64), then its n-grams' hashes (uint32, ascending).

    Raises:
        UserError: the package datasketch is not installed.
    """
    try:
        from datasketch import MinHash
    except ModuleNotFoundError:
        raise UserError("near_duplicates.threshold needs the package datasketch: install 'select-moe[data]'") from None
    import numpy as np

    found = row_words(messages) or ["\n".join(m["content"] for m in messages)]
    hashes = windows(word_codes(found), min(config.ngram, len(found)))
    grams = np.unique((hashes >> np.uint64(32)).astype("<u4"))
    signature = MinHash(PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    signature.update_batch(grams.tolist())
    bands, width = bands_of(config.threshold)
    values = signature.hashvalues[: bands * width].astype(np.uint64).reshape(bands, width)
    keys = windows(values.T, width)[0]
    return bytes(keys.astype("<u8").tobytes() + grams.tobytes())


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A row that goes."""

    row: int
    kept: int
    """The row that stays."""
    similarity: float
    """Jaccard similarity of the two."""


class NearDuplicates:
    """The rows of one dataset, to be compared with each other. In memory: some 32 bytes a row; the rest is on disk."""

    def __init__(self, config: NearDuplicatesConfig, scratch: Path) -> None:
        """Begin.

        Args:
            config: threshold and size of the n-grams.
            scratch: a folder to write in; 4 bytes per n-gram and 170 (at the usual threshold) per row.
        """
        self.config = config
        self.bands = bands_of(config.threshold)[0]
        scratch.mkdir(parents=True, exist_ok=True)
        self._paths = (scratch / "keys", scratch / "grams")
        self._keys, self._grams = (path.open("wb") for path in self._paths)
        self._contents = bytearray()
        self._numbers, self._sizes = array("q"), array("q")

    def add(self, row: int, content: bytes, sketched: bytes) -> None:
        """Take one row, in any order.

        Args:
            row: its number in the order of ids.
            content: hash of its content, at least 16 bytes; the smallest is kept, of equal ones the smallest number.
            sketched: of `sketch`.

        Raises:
            Unavailable: the disk is full.
        """
        self._contents += content[:16]
        self._numbers.append(row)
        self._sizes.append((len(sketched) - 8 * self.bands) // 4)
        try:
            self._keys.write(sketched[: 8 * self.bands])
            self._grams.write(sketched[8 * self.bands :])
        except OSError as error:
            raise unwritable(self._paths[0].parent, error) from None

    def find(self) -> list[NearDuplicate]:
        """The rows that go, by content hash; the scratch files are removed.

        Raises:
            Unavailable: the disk is full.
        """
        try:
            self._keys.close()
            self._grams.close()
        except OSError as error:
            raise unwritable(self._paths[0].parent, error) from None
        with self._paths[1].open("rb") as file:
            found = self._sift(file.fileno())
        for path in self._paths:
            path.unlink()
        return found

    def _sift(self, file: int) -> list[NearDuplicate]:
        """Go through the rows that share a key with another, by content hash."""
        import numpy as np

        ends = np.cumsum(np.frombuffer(self._sizes, np.int64))

        @functools.lru_cache(maxsize=10_000)
        def grams(row: int) -> NDArray[np.uint32]:
            size = self._sizes[row]
            return np.frombuffer(os.pread(file, 4 * size, 4 * (int(ends[row]) - size)), "<u4")

        def similarity(a: int, b: int) -> float:
            few, many = sorted((self._sizes[a], self._sizes[b]))
            if few < self.config.threshold * many:  # cannot be reached
                return 0.0
            both = len(np.intersect1d(grams(a), grams(b), assume_unique=True))
            return both / (few + many - both)

        kept: defaultdict[int, list[int]] = defaultdict(list)
        out: list[NearDuplicate] = []
        shared = self._shared()
        rank = {row: n for n, row in enumerate(self._order(list(shared)))}
        for row in rank:
            buckets = shared.pop(row)
            for other in sorted({other for bucket in buckets for other in kept[bucket]}, key=rank.__getitem__):
                if (like := similarity(row, other)) >= self.config.threshold:
                    out.append(NearDuplicate(self._numbers[row], self._numbers[other], like))
                    break
            else:
                for bucket in buckets:
                    if len(kept[bucket]) < MOST:
                        kept[bucket].append(row)
        return out

    def _order(self, rows: list[int]) -> list[int]:
        """Rows by content hash; of one content, by number."""
        return sorted(rows, key=lambda row: (self._contents[16 * row : 16 * row + 16], self._numbers[row]))

    def _shared(self) -> dict[int, array[int]]:
        """Row -> the buckets that it shares with other rows: a bucket is a band and a key."""
        import numpy as np

        shared: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))
        first = 0
        for band in range(self.bands):
            keys = np.empty(len(self._numbers), np.uint64)
            with self._paths[0].open("rb") as file:
                for at in range(0, len(keys), BLOCK):
                    block = np.fromfile(file, "<u8", BLOCK * self.bands).reshape(-1, self.bands)
                    keys[at : at + len(block)] = block[:, band]
            _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            rows = np.flatnonzero(counts[inverse] > 1)
            for row, bucket in zip(rows.tolist(), (inverse[rows] + first).tolist(), strict=True):
                shared[row].append(bucket)
            first += len(counts)
        return shared
