"""A dataset's rows as tokens on this machine's disk: written once while routing is planned, read batch by batch.

No command runs this module; `selectmoe route` does. A folder of three files: `ids` (int32) and `kinds` (uint8), token
after token, row after row in the pool's order, and `rows.npz`, written last, with what is known of every row and the key
of the work that the folder belongs to. Only the latter is in memory; a batch reads its rows' bytes where they lie.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from selectmoe.errors import Unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selectmoe.pool import Row

IDS, KINDS, ROWS = "ids", "kinds", "rows.npz"
AT_ONCE = 1024
"""Rows that are tokenised at once."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """What is known of N rows before any is routed, in the pool's order (by id)."""

    tokens: npt.NDArray[np.int32]
    """[N] at most max_length."""
    answer_tokens: npt.NDArray[np.int32]
    """[N] answer tokens among them."""
    truncated: npt.NDArray[np.bool_]
    """[N] whether tokens were cut off."""
    answer_bytes: Ints
    """[N] UTF-8 bytes of the answers, whole even where truncated."""


class TokenStore:
    """The tokens of one dataset."""

    def __init__(self, folder: Path, rows: Rows) -> None:
        """Open what `write` has written."""
        self.rows = rows
        self._ends = np.cumsum(rows.tokens, dtype=np.int64)
        self._ids = os.open(folder / IDS, os.O_RDONLY)
        self._kinds = os.open(folder / KINDS, os.O_RDONLY)

    def close(self) -> None:
        """Close the files."""
        os.close(self._ids)
        os.close(self._kinds)

    def read(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Ids and kinds (`selectmoe.template.Kind`) of a row's tokens."""
        size = int(self.rows.tokens[row])
        start = int(self._ends[row]) - size
        ids = np.frombuffer(os.pread(self._ids, 4 * size, 4 * start), np.int32)
        kinds = np.frombuffer(os.pread(self._kinds, size, start), np.uint8)
        if len(ids) != size or len(kinds) != size:
            raise RuntimeError(f"the tokens of row {row} are gone from this run's folder: start again")
        return ids, kinds


def find(folder: Path, key: str) -> TokenStore | None:
    """The store that an earlier run has written for the same work; None where there is none."""
    if not (folder / ROWS).is_file():
        return None
    with np.load(folder / ROWS, allow_pickle=False) as found:
        if str(found["key"]) != key:
            return None
        return TokenStore(folder, Rows(**{name: found[name] for name in Rows.__dataclass_fields__}))


def write(
    folder: Path, key: str, rows: Iterable[Row], count: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenStore:
    """Tokenise a dataset.

    Args:
        folder: emptied and filled.
        key: what work this is.
        rows: in the pool's order.
        count: how many they are.
        tokenizer: the judge's.
        max_length: tokens kept of a row.

    Raises:
        Unavailable: the disk is full.
        RuntimeError: there are more or fewer rows.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = Rows(
        np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, np.bool_), np.zeros(count, np.int64)
    )
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(folder / name, "wb")) for name in (IDS, KINDS)]
            at, stream = 0, iter(rows)
            while part := list(islice(stream, AT_ONCE)):
                if at + len(part) > count:
                    raise RuntimeError(f"{folder.name} has more than the {count} rows of its manifest")
                ids, kinds = _fill(known, at, part, tokenizer, max_length)
                files[0].write(ids.data)
                files[1].write(kinds.data)
                at += len(part)
        if at != count:
            raise RuntimeError(f"{folder.name} has {at} rows, its manifest says {count}")
        with open(folder / f"{ROWS}.part", "wb") as file:
            np.savez(file, key=np.array(key), **vars(known))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Unavailable(
            f"{folder} cannot be written ({error.strerror}); the same command goes on from here"
        ) from None
    (folder / f"{ROWS}.part").rename(folder / ROWS)
    return TokenStore(folder, known)


def _fill(
    known: Rows, at: int, part: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Note what is known of rows `at` and after; their ids and kinds."""
    from selectmoe.template import Kind, encode_segments

    found = encode_segments((row.messages for row in part), tokenizer, max_length)
    here = slice(at, at + len(part))
    known.tokens[here], known.truncated[here] = found.lengths, found.truncated
    owners = np.repeat(np.arange(len(part)), found.lengths)
    known.answer_tokens[here] = np.bincount(owners[found.kinds == Kind.ASSISTANT], minlength=len(part))
    known.answer_bytes[here] = [sum(len(text.encode("utf-8")) for text in row.answers) for row in part]
    return found.input_ids, found.kinds
