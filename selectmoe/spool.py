"""Rows between reading and writing: texts on the local disk, and of each row some bytes in memory.

No command runs this module; `ingest` does. Every worker appends to files of its own, in the order in which it reads:

* `N.rows`: the canonical messages of its rows, one after the other: exactly the bytes that were hashed;
* `N.index`: a `ROW` for each, in the same order; `N.ids`: the sources' own ids, UTF-8, likewise;
* `N.rejected` (JSON, see `Spool.reject`) and `N.rejected-index` (`REJECT`): what could not be used.

In which worker's files a row lies, and where, has no influence on what is written from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from selectmoe.pool import Message

ROW = np.dtype(
    [
        ("content", ">u8", 2),
        ("held", ">u8"),
        ("drawn", ">u8"),
        ("at", "<u8"),
        ("size", "<u4"),
        ("text", "<u4"),
        ("answers", "<u4"),
        ("dataset", "<u2"),
        ("id", "<u2"),
    ]
)
"""Of a row: the first 128 bits of its content's hash; 64 bits of the salted hashes that draw the holdout and the
subset; where its canonical messages begin, and their bytes; bytes (UTF-8) of all its texts and of its answers; the
dataset's number in its piece; bytes of its own id."""
PACKED = struct.Struct("<16s8s8sQIIIHH")
REJECT = np.dtype([("piece", "<u4"), ("size", "<u4"), ("line", "<u8"), ("at", "<u8")])
HELD = b"holdout"
"""Salt: by the plain hash, which ids show, the rows that stay would be recognisable by their ids."""

Rows = npt.NDArray[Any]
"""An array of `ROW`."""


def canonical(messages: Sequence[Message]) -> bytes:
    """What is hashed: `manifest.canonical_json` of the messages, of which this is the fast form."""
    turns = [f'{{"content":{encode_basestring(m["content"])},"role":"{m["role"]}"}}' for m in messages]
    return f"[{','.join(turns)}]".encode()


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@dataclass
class Place:
    """Where the rows of a piece lie: one after the other in the files of one worker."""

    worker: int
    first: int
    """Which of the worker's rows is the first."""
    ids_at: int
    """Where its own id begins in `N.ids`."""
    rows: dict[str, int] = field(default_factory=dict)
    """Dataset -> number of rows; `dataset` of a `ROW` counts these names."""
    numbers: dict[str, int] = field(default_factory=dict)


class Spool:
    """One worker's files, appended to.

    Args:
        folder: an existing folder.
        worker: which of the workers this is.
        texts: whether the texts are kept; without, only the index is.
    """

    def __init__(self, folder: Path, worker: int, texts: bool = True) -> None:
        self.worker = worker
        self.texts = texts
        self._files = [(folder / f"{worker}.{name}").open("ab", 1 << 20) for name in FILES]
        self._rows, self._index, self._ids, self._rejected, self._rejected_index = self._files
        self._at, self._rejected_at = self._rows.tell(), self._rejected.tell()

    def place(self) -> Place:
        """Where the next piece begins."""
        return Place(self.worker, self._index.tell() // ROW.itemsize, self._ids.tell())

    def add(self, place: Place, dataset: str, messages: Sequence[Message], own_id: str, draw: bytes) -> None:
        """Append a row.

        Args:
            place: of its piece, which counts it.
            dataset: that it is of.
            messages: of the row.
            own_id: the source's own id, or empty.
            draw: salt of the hash that draws a subset.
        """
        text = canonical(messages)
        content = hashlib.sha256(text)
        digits = content.hexdigest().encode()
        held, drawn = hashlib.sha256(HELD + digits).digest(), hashlib.sha256(draw + digits).digest()
        sizes = [_size(m["content"]) for m in messages]
        answers = sum(size for size, m in zip(sizes, messages, strict=True) if m["role"] == "assistant")
        name = own_id.encode()
        place.rows[dataset] = place.rows.get(dataset, 0) + 1
        of = place.numbers.setdefault(dataset, len(place.numbers))
        numbers = (self._at, len(text), sum(sizes), answers, of, len(name))
        self._index.write(PACKED.pack(content.digest()[:16], held[:8], drawn[:8], *numbers))
        self._ids.write(name)
        if self.texts:
            self._rows.write(text)
            self._at += len(text)

    def reject(self, piece: int, line: int, reason: str, value: Any, raw: bytes) -> None:
        """Append a record that cannot be used.

        Args:
            piece: number of the piece that it is from.
            line: in the piece.
            reason: why.
            value: what was read, as far as it could be.
            raw: its bytes, where it has some; they are kept where JSON in turn cannot say the value.
        """
        text = _rejected_json(reason, value, raw)
        self._rejected.write(text)
        self._rejected_index.write(np.array([(piece, len(text), line, self._rejected_at)], REJECT).tobytes())
        self._rejected_at += len(text)

    def flush(self) -> None:
        """Let other processes see what was appended."""
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Close the files; what was not flushed need not be there, and on a full disk cannot."""
        for file in self._files:
            with suppress(OSError):
                file.close()


FILES = ("rows", "index", "ids", "rejected", "rejected-index")


REASON = '"reason": '


def _rejected_json(reason: str, value: Any, raw: bytes) -> bytes:
    """Reason and record as the end of a JSON object, in ASCII, since the record may hold text that UTF-8 cannot."""
    try:
        record = json.dumps(value, sort_keys=True, default=str, allow_nan=False)
    except (ValueError, TypeError, RecursionError):  # a table's NaN, keys of several types, too deep to be written
        record = json.dumps(raw.decode("utf-8", "replace") if raw else repr(value))
    return f'{REASON}{json.dumps(reason)}, "record": {record}}}'.encode("ascii")


class Texts:
    """The rows' texts, read at random."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[tuple[int, str], IO[bytes]] = {}

    def _read(self, worker: int, name: str, at: int, size: int) -> bytes:
        file = self._open.get((worker, name))
        if file is None:
            file = self._open[worker, name] = (self._folder / f"{worker}.{name}").open("rb", 0)
        data = os.pread(file.fileno(), size, at)
        if len(data) != size:
            raise RuntimeError(f"{file.name} holds no {size} bytes at {at}: it was changed while ingest ran")
        return data

    def messages(self, workers: Sequence[int] | npt.NDArray[Any], rows: Rows) -> list[list[Message]]:
        """The messages of rows.

        Args:
            workers: in whose files each lies.
            rows: the rows, of `ROW`.

        Raises:
            RuntimeError: one is not what was read from the source.
        """
        contents = rows["content"].astype(">u8").tobytes()
        found: list[list[Message]] = []
        places = zip(np.asarray(workers).tolist(), rows["at"].tolist(), rows["size"].tolist(), strict=True)
        for n, (worker, at, size) in enumerate(places):
            text = self._read(worker, "rows", at, size)
            if hashlib.sha256(text).digest()[:16] != contents[16 * n : 16 * n + 16]:
                raise RuntimeError(f"a row in {self._folder} is not what was read: is the disk sound?")
            found.append(json.loads(text))
        return found

    def rejected(self, worker: int, reject: Any) -> tuple[str, str]:
        """The reason why one could not be used; and reason and record as the end of a JSON object."""
        text = self._read(worker, "rejected", int(reject["at"]), int(reject["size"])).decode("ascii")
        reason, _ = json.JSONDecoder().raw_decode(text, len(REASON))
        return reason, text

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()


def rows_at(folder: Path, place: Place) -> tuple[Rows, bytes]:
    """The rows of a piece, and their own ids one after the other.

    Raises:
        RuntimeError: they are not all there.
    """
    count, path = sum(place.rows.values()), folder / f"{place.worker}.index"
    rows = np.fromfile(path, ROW, count, offset=place.first * ROW.itemsize)
    with path.with_suffix(".ids").open("rb") as file:
        file.seek(place.ids_at)
        ids = file.read(wanted := int(rows["id"].sum(dtype="u8")))
    if len(rows) != count or len(ids) != wanted:
        raise RuntimeError(f"{path} holds {len(rows)} of {count} rows: rows were lost")
    return rows, ids


@dataclass(frozen=True)
class Rejects:
    """Where the records that could not be used lie, in their order: piece, then line."""

    worker: npt.NDArray[np.uint16]
    entries: npt.NDArray[Any]
    """Of `REJECT`."""

    def __len__(self) -> int:
        return len(self.worker)


def rejects(folder: Path) -> Rejects:
    """All records that could not be used."""
    found = [
        (int(path.stem), np.fromfile(path, REJECT))
        for path in sorted(folder.glob("*.rejected-index"), key=lambda path: int(path.stem))
    ]
    entries = np.concatenate([np.empty(0, REJECT), *(part for _, part in found)])
    workers = np.concatenate([np.empty(0, np.uint16), *(np.full(len(part), n, np.uint16) for n, part in found)])
    order = np.lexsort((entries["line"], entries["piece"]))
    return Rejects(workers[order], entries[order])


_spools: dict[Path, Spool] = {}
_texts: dict[Path, Texts] = {}


def writer(folder: Path, worker: int, texts: bool) -> Spool:
    """This process's files in a spool, opened once."""
    if folder not in _spools:
        _spools[folder] = Spool(folder, worker, texts)
    return _spools[folder]


def texts(folder: Path) -> Texts:
    """The texts of a spool, opened once by this process."""
    if folder not in _texts:
        _texts[folder] = Texts(folder)
    return _texts[folder]


def release(folder: Path) -> None:
    """Close what this process has open of a spool."""
    for opened in (_spools.pop(folder, None), _texts.pop(folder, None)):
        if opened is not None:
            opened.close()
