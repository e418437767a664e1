"""Files as records: strict JSON and Parquet in pieces that several processes read, every record with its place.

No command runs this module; `ingest` reads through it. Files: `.jsonl` (one record a line), `.json` (a list of records, or
lines), both also `.gz` and `.zst`; `.parquet`. Reading is strict: UTF-8, JSON without NaN; of a key that stands twice in an
object, the last counts. A record that cannot be read keeps its reason and never takes its file with it. Nothing is
held but what is being read: a line, an element of a list, a batch of a table.

A plain `.jsonl` is cut into ranges of bytes; a line belongs to the range in which it begins. Parquet is cut at its
row groups. Compressed files, `.json` and streams are one piece each.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

from selectmoe.errors import Unavailable, UserError
from selectmoe.sources import Source, Stream

PIECE = 16 << 20
"""Bytes of a plain `.jsonl`, or of a Parquet file as its row groups are stored, that one process reads at once."""
MAX_LINE = 64 << 20
"""Bytes of one line, or of one element of a list; a longer one is rejected."""
MAX_RATIO = 200
"""Uncompressed over compressed bytes, above which a file is refused as a decompression bomb (looked at after 64 MiB)."""
BLOCK = 1 << 20
"""Bytes that are read at once."""
BATCH_BYTES, BATCH_ROWS = 8 << 20, 1000
"""Of a table, that are unpacked at once."""
BOM = b"\xef\xbb\xbf"
TOO_LONG, NOT_UTF8, NOT_JSON = "line too long", "not UTF-8", "not JSON"
"""Kinds of records that cannot be read."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file: its place, and what it holds or why it cannot be read."""

    line: int
    """Line number, or number in the list or table, from 1; in a piece, from where the piece begins."""
    value: Any
    """The parsed record; for one that cannot be read, its raw text."""
    error: str = ""
    """Why it cannot be read, or empty."""
    kind: str = ""
    """The same in a word or two, for counting."""
    raw: bytes = b""
    """What it was parsed from; empty where that was a table's row."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that one process reads."""

    source: Source | Stream
    start: int = 0
    """First byte of a range, or first row group."""
    end: int | None = None
    """Where the range ends (exclusive); None: with the source."""
    size: int = 0
    """Bytes as they lie there, for a progress bar."""


def pieces_of(source: Source | Stream) -> list[Piece]:
    """The pieces in which a source is read, in its order.

    Raises:
        UserError: it is a damaged Parquet file.
    """
    if isinstance(source, Stream):
        return [Piece(source)]
    if source.kind == ".parquet":
        return _row_groups(source)
    if source.kind == ".jsonl" and not source.compression and source.size > PIECE:
        starts = range(0, source.size, PIECE)
        return [Piece(source, at, min(at + PIECE, source.size), min(PIECE, source.size - at)) for at in starts]
    return [Piece(source, size=source.size)]


class Reading:
    """The records of one piece, read once; then `lines` says how many lines, elements or rows it holds."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.lines = 0

    def __iter__(self) -> Iterator[Record]:
        """Every record, in the source's order; blank lines are none.

        Raises:
            UserError: the source is damaged.
            Unavailable: a server does not answer.
        """
        source = self.piece.source
        with explained(source):
            if isinstance(source, Stream):
                yield from self._numbered(source.records())
            elif source.kind == ".parquet":
                yield from self._table(source)
            elif source.kind == ".json":
                yield from self._list_or_lines(source)
            else:
                yield from self._lines(source)

    def _numbered(self, values: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
        for value in values:
            self.lines += 1
            yield Record(self.lines, {k: v for k, v in value.items() if v is not None})

    def _lines(self, source: Source) -> Iterator[Record]:
        for raw in raw_lines(source, self.piece.start, self.piece.end):
            self.lines += 1
            if len(raw) > MAX_LINE:
                yield _too_long(self.lines, raw)
            elif not raw.isspace():
                yield parse(self.lines, raw)

    def _list_or_lines(self, source: Source) -> Iterator[Record]:
        """A `.json` file: one list of records, or else one record a line, as many are written, or a single record."""
        first = next((raw for raw in raw_lines(source) if not raw.isspace()), b"").lstrip()
        if first.startswith(b"["):
            yield from self._elements(source)
        elif not first or not parse(1, first).error or (whole := _single(source)) is None:
            yield from self._lines(source)
        else:
            self.lines = 1
            yield Record(1, whole)

    def _elements(self, source: Source) -> Iterator[Record]:
        with opened(source) as file:
            for raw in _Elements(file, source):
                self.lines += 1
                yield _too_long(self.lines, raw) if len(raw) > MAX_LINE else parse(self.lines, raw)

    def _table(self, source: Source) -> Iterator[Record]:
        with parquet(source) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{source.uri} has two columns called {twice[0]}")
            end = file.num_row_groups if self.piece.end is None else self.piece.end
            for group in range(self.piece.start, end):
                found = file.metadata.row_group(group)
                fits = BATCH_BYTES * found.num_rows // max(1, found.total_byte_size)
                for batch in file.iter_batches(max(1, min(BATCH_ROWS, fits)), row_groups=[group]):
                    yield from self._batch(batch)

    def _batch(self, batch: Any) -> Iterator[Record]:
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = [self._decoded(batch.slice(at, 1)) for at in range(len(batch))]
        for value in values:
            self.lines += 1
            if isinstance(value, Record):
                yield replace(value, line=self.lines)
            else:
                yield Record(self.lines, _present(value))

    def _decoded(self, row: Any) -> Any:
        """One row of a table as a mapping, or as a record that cannot be read."""
        try:
            return row.to_pylist()[0]
        except UnicodeDecodeError as error:
            import pyarrow as pa

            columns = [column.cast(_bytes_type(column.type)) for column in row.columns]
            value = pa.record_batch(columns, names=row.schema.names).to_pylist()[0]
            return Record(0, str(_present(value)), f"not UTF-8 (byte {error.start} of a text)", NOT_UTF8)


def _present(value: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row without the columns that are null in it."""
    return {k: v for k, v in value.items() if v is not None}


def _bytes_type(kind: Any) -> Any:
    """An Arrow type with bytes where it has texts."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_bytes_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _bytes_type(field.type)) for field in kind])
    return kind


@contextmanager
def explained(source: Source | Stream) -> Iterator[None]:
    """Turn what libraries say about damaged files into a mistake of the user's that names the source."""
    import zlib

    import pyarrow as pa

    try:
        yield
    except (UserError, Unavailable):
        raise
    except pa.ArrowException as error:
        what = "Parquet" if getattr(source, "kind", "") == ".parquet" else "whole"
        raise UserError(f"{source.uri} is not {what}: {_first_line(error)}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{source.uri} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def opened(source: Source, end: int | None = None) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked; little is fetched beyond `end`."""
    with source.open(end) as file:
        if source.compression == "gzip":
            import gzip

            yield io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK)
        elif source.compression == "zstd":
            import pyarrow as pa

            yield io.BufferedReader(pa.CompressedInputStream(file, "zstd"), BLOCK)
        else:
            yield file


@contextmanager
def parquet(source: Source) -> Iterator[Any]:
    """A Parquet file, read page by page."""
    import pyarrow.parquet as pq

    with source.open() as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK) as table:
        yield table


def _row_groups(source: Source) -> list[Piece]:
    found: list[Piece] = []
    with explained(source), parquet(source) as file:
        start = size = 0
        for group in range(file.num_row_groups):
            stored = file.metadata.row_group(group)
            packed = sum(stored.column(n).total_compressed_size for n in range(stored.num_columns))
            if size and size + packed > PIECE:
                found.append(Piece(source, start, group, size))
                start, size = group, 0
            size += packed
        found.append(Piece(source, start, file.num_row_groups, size))
    return found


def raw_lines(source: Source, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The lines that begin in a range of a file's bytes; of one longer than `MAX_LINE` its first `MAX_LINE` + 1 bytes.

    Raises:
        UserError: the file unpacks to more than `MAX_RATIO` times its size.
    """
    with opened(source, end) as file:
        at = 0
        if start:
            file.seek(start - 1)
            at = start - 1 + _skip(file, None if end is None else end - start + 1)
        while (end is None or at < end) and (line := file.readline(MAX_LINE + 1)):
            at += len(line)
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                at += _skip(file)
            if source.compression:
                _check_ratio(source, at)
            yield line.removeprefix(BOM) if at == len(line) else line


def _skip(file: IO[bytes], most: int | None = None) -> int:
    """Read to the end of a line, or at most so many bytes; returns how many."""
    skipped = 0
    while (most is None or skipped < most) and (part := file.readline(BLOCK)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _check_ratio(source: Source, unpacked: int) -> None:
    if unpacked > MAX_LINE and unpacked > MAX_RATIO * source.size:
        raise UserError(f"{source.uri} unpacks to more than {MAX_RATIO} times its size: refused")


def _too_long(line: int, raw: bytes) -> Record:
    shown = raw[:200].decode("utf-8", "replace")
    return Record(line, shown, f"line longer than {MAX_LINE >> 20} MiB", TOO_LONG)


def _single(source: Source) -> Any:
    """The one JSON value that a file holds; None where it does not, or is longer than a line may be."""
    with opened(source) as file:
        text = file.read(MAX_LINE + 1)
    found = parse(1, text.removeprefix(BOM))
    return None if len(text) > MAX_LINE or found.error else found.value


class _Elements:
    """The elements of one JSON list, cut out of a file's bytes without parsing them.

    Only brackets and strings are looked at, so that an element may be anything; whether it is JSON its parser says.
    """

    MARK = re.compile(rb'["\[\]{},]')

    def __init__(self, file: IO[bytes], source: Source) -> None:
        self.file, self.source = file, source
        self.data = b""
        self.read = 0
        self.start = 0
        """Where the element begins in `data`."""
        self.long = False
        """Whether the element is over `MAX_LINE` and only what is needed to find its end is kept."""
        self.head = b""

    def _more(self, at: int) -> int:
        """Read on, and drop what is no longer needed before `at`; returns the new place of `at`."""
        block = self.file.read(BLOCK)
        if not block:
            raise UserError(f"{self.source.uri} is not JSON: the list that it begins with does not end")
        self.read += len(block)
        if self.source.compression:
            _check_ratio(self.source, self.read)
        if not self.long and at - self.start > MAX_LINE:
            self.long, self.head = True, self.data[self.start : self.start + MAX_LINE + 1]
        keep = at if self.long else self.start
        self.data, self.start = self.data[keep:] + block, 0
        return at - keep

    def __iter__(self) -> Iterator[bytes]:
        at = self._opened()
        depth = n = 0
        while True:
            found = self.MARK.search(self.data, at)
            if found is None:
                at = self._more(len(self.data))
                continue
            mark, at = found[0], found.end()
            if mark == b'"':
                at = self._string_end(at)
            elif mark in b"[{":
                depth += 1
            elif depth and mark in b"]}":
                depth -= 1
            elif not depth and mark in b",]":
                raw = self.head if self.long else self.data[self.start : at - 1]
                if n or mark == b"," or raw.strip():
                    yield raw
                n += 1
                self.start, self.long, self.head = at, False, b""
                if mark == b"]":
                    self._closed(at)
                    return

    def _opened(self) -> int:
        """Where the first element begins."""
        at = self._more(0)
        while (begins := self.data.find(b"[", at)) < 0:
            at = self._more(len(self.data))
        self.start = begins + 1
        return self.start

    def _string_end(self, at: int) -> int:
        """Where a string ends whose text begins at `at`, or goes on there."""
        while True:
            quote = self.data.find(b'"', at)
            part = self.data[at : quote if quote >= 0 else len(self.data)]
            escapes = len(part) - len(part.rstrip(b"\\"))
            if quote < 0:
                at = self._more(len(self.data) - escapes)
            elif escapes % 2:
                at = quote + 1
            else:
                return quote + 1

    def _closed(self, at: int) -> None:
        """Nothing but blanks may follow."""
        rest = self.data[at:]
        while not rest.strip() and (rest := self.file.read(BLOCK)):
            pass
        if rest.strip():
            raise UserError(f"{self.source.uri} is not JSON: something follows the list that it begins with")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def parse(line: int, raw: bytes) -> Record:
    """One record from the bytes of strict JSON; the reason in `error` where they are none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = raw.decode("utf-8", "replace").strip()
        return Record(line, shown, f"not UTF-8 (byte {error.start})", NOT_UTF8, raw)
    try:
        return Record(line, _DECODER.decode(text), raw=raw)
    except (ValueError, RecursionError) as error:
        return Record(line, text.strip(), f"not JSON ({error})", NOT_JSON, raw)
