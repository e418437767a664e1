"""Datasets read into a spool, a piece per task: every record becomes a row, or is rejected with its reason.

No command runs this module; `ingest` and `check` read through it. `take_in` plans the pieces, has them read by however many
workers, and gives what they found: a table per dataset (`selectmoe.table`), the rejected records, and a tally per source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectmoe import spool
from selectmoe.errors import Unavailable, UserError, unwritable
from selectmoe.formats import FormatError, format_of, own_dataset, own_id, schema, to_messages
from selectmoe.pool import text_bytes
from selectmoe.progress import progress, transfer
from selectmoe.records import MAX_LINE, NOT_JSON, NOT_UTF8, TOO_LONG, Piece, Reading, Record, pieces_of
from selectmoe.sources import Dataset, Source, Stream
from selectmoe.table import Table, tables
from selectmoe.workers import Workers, number

UNREADABLE, UNUSABLE = "not readable as JSON", "not convertible into messages"
"""Reasons in the manifest; the records' own are in `rejected.jsonl`."""
UNREAD = (TOO_LONG, NOT_UTF8, NOT_JSON)
MAX_DATASETS = 1000
"""Datasets that the rows of one piece may name."""


@dataclass(frozen=True)
class Settings:
    """What the reading of every piece depends on."""

    folder: Path
    """Of the spool."""
    texts: bool = True
    """Whether the rows' texts are kept, or only their sizes and hashes."""
    own_ids: bool = True
    """Whether rows keep the ids that their source gives them."""
    draw: bytes = b""
    """Salt of the hash that draws subsets."""


@dataclass(frozen=True)
class Task:
    """One piece to be read."""

    number: int
    """Of the piece, over all datasets."""
    dataset: str
    several: bool
    schema: str
    piece: Piece
    settings: Settings


@dataclass
class Tally:
    """What a piece, or a whole source, was found to hold."""

    lines: int = 0
    records: int = 0
    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Kind of reason -> records."""
    formats: Counter[str] = field(default_factory=Counter)
    """Name of a format -> records that have it."""

    def add(self, other: Tally) -> None:
        """Count another piece's, too."""
        self.lines += other.lines
        self.records += other.records
        self.rows += other.rows
        self.rejected += other.rejected
        self.formats += other.formats

    @property
    def unreadable(self) -> int:
        """Records that are not even JSON."""
        return sum(self.rejected[kind] for kind in UNREAD)


@dataclass(frozen=True)
class Found:
    """What came of a task."""

    number: int
    place: spool.Place
    """Of its rows."""
    tally: Tally


def read(task: Task) -> Found:
    """Read one piece into this worker's spool files.

    Raises:
        UserError: the source is damaged, or its rows name far too many datasets.
        Unavailable: the disk is full, or a server does not answer.
    """
    settings = task.settings
    try:
        out = spool.writer(settings.folder, number(), settings.texts)
        found = Found(task.number, out.place(), Tally())
        _read(task, found, out)
        out.flush()
    except Unavailable:
        raise
    except OSError as error:  # a source's own are mistakes of the user's by now
        raise unwritable(settings.folder, error) from None
    if found.tally.records != found.tally.rows + found.tally.rejected.total():
        raise RuntimeError(f"{task.piece.source.uri}: {found.tally} does not add up: rows were lost")
    return found


def _read(task: Task, found: Found, out: spool.Spool) -> None:
    tally, place, own_ids = found.tally, found.place, task.settings.own_ids
    wanted = schema(task.schema, "schema") if task.schema else None
    reading = Reading(task.piece)
    for record in reading:
        tally.records += 1
        try:
            if record.error:
                raise FormatError(record.error, record.kind)
            form = format_of(record.value, wanted)
            tally.formats[form.name] += 1
            messages = to_messages(record.value, form)
            row_id = own_id(record.value)
            dataset = own_dataset(record.value, task.dataset) if task.several else task.dataset
            _check_size(record, messages)
        except FormatError as error:
            tally.rejected[error.kind] += 1
            out.reject(task.number, record.line, str(error), record.value, record.raw)
            continue
        if dataset not in place.rows and len(place.rows) == MAX_DATASETS:
            raise UserError(f"{task.piece.source.uri}: its rows name over {MAX_DATASETS} datasets: is `dataset` an id?")
        out.add(place, dataset, messages, row_id if own_ids else "", task.settings.draw)
    tally.lines, tally.rows = reading.lines, sum(place.rows.values())


def _check_size(record: Record, messages: Any) -> None:
    """A table's row may be no longer than a line."""
    if not record.raw and text_bytes(messages) > MAX_LINE:
        raise FormatError(f"row longer than {MAX_LINE >> 20} MiB", TOO_LONG)


@dataclass(frozen=True)
class Rejected:
    """A record that could not be used."""

    dataset: str
    file: str
    line: int
    reason: str
    rest: str
    """Reason and record, as the end of a JSON object."""

    def line_of_json(self) -> str:
        """What stands in `rejected.jsonl`."""
        place = json.dumps({"dataset": self.dataset, "file": self.file, "line": self.line})
        return f"{place[:-1]}, {self.rest}\n"


@dataclass(frozen=True)
class ReadSource:
    """A source, and what it was found to hold."""

    dataset: Dataset
    source: Source | Stream
    schema: str
    """The schema that its records had to have, or empty."""
    tally: Tally


@dataclass(frozen=True)
class Intake:
    """All that was read."""

    tables: dict[str, Table]
    """By dataset, sorted by name."""
    origins: dict[str, set[str]]
    """Dataset -> the datasets that were asked for which hold its rows; another one's where a file holds several."""
    sources: list[ReadSource]
    """In the order of the datasets and of their sources."""
    rejects: spool.Rejects
    places: list[tuple[str, str, int]]
    """Of every piece: dataset, source, and the lines before it."""
    folder: Path
    """Of the spool."""

    @property
    def seen(self) -> int:
        """Records that were read."""
        return sum(read.tally.records for read in self.sources)

    def rejected(self, most: int | None = None) -> Iterator[Rejected]:
        """The rejected records, or the first of them, by dataset, source and line."""
        texts = spool.texts(self.folder)
        for worker, entry in zip(self.rejects.worker[:most].tolist(), self.rejects.entries[:most], strict=True):
            dataset, place, before = self.places[entry["piece"]]
            yield Rejected(dataset, place, before + int(entry["line"]), *texts.rejected(worker, entry))


def take_in(
    datasets: Mapping[str, Dataset], schemas: Mapping[str, str], settings: Settings, workers: Workers
) -> Intake:
    """Read datasets.

    Args:
        datasets: by name.
        schemas: dataset -> the schema that its records must have; none, or empty: it is found record by record.
        settings: of every piece.
        workers: who reads.

    Raises:
        UserError: a source is damaged, changed meanwhile, or holds no record that can be read.
        Unavailable: a server does not answer.
    """
    pieces = [(data, at, piece) for data in datasets.values() for at in data.sources for piece in pieces_of(at)]
    tasks = [
        Task(n, data.name, data.several, schemas.get(data.name, ""), piece, settings)
        for n, (data, _, piece) in enumerate(pieces)
    ]
    found = dict(sorted(_read_all(tasks, workers)))
    if len(found) != len(tasks):
        raise RuntimeError(f"{len(tasks)} pieces were to be read, {len(found)} were: rows were lost")
    sources = [
        ReadSource(data, source, schemas.get(data.name, ""), Tally())
        for data in datasets.values()
        for source in data.sources
    ]
    by_source = {id(read.source): read.tally for read in sources}
    places: list[tuple[str, str, int]] = []
    origins: dict[str, set[str]] = {}
    for n, (data, source, _) in enumerate(pieces):
        places.append((data.name, source.place, by_source[id(source)].lines))
        by_source[id(source)].add(found[n].tally)
        for name in found[n].place.rows:
            origins.setdefault(name, set()).add(data.name)
    folder = settings.folder
    read_tables = tables(folder, [part.place for part in found.values()])
    intake = Intake(read_tables, origins, sources, spool.rejects(folder), places, folder)
    _check(intake)
    return intake


def _read_all(tasks: list[Task], workers: Workers) -> Iterator[tuple[int, Found]]:
    sizes = [task.piece.size for task in tasks]
    results: Iterable[Found] = workers.map(read, tasks)
    if not any(sizes):  # streams
        results = progress(results, "ingest: reading", len(tasks), "pieces")
    with transfer("ingest: reading", sum(sizes)) as moved:
        for result in results:
            yield result.number, result
            moved(sizes[result.number])


def _check(intake: Intake) -> None:
    """Whether every source was what it was taken for, and every record is in one place."""
    rows, rejected = sum(len(table) for table in intake.tables.values()), len(intake.rejects)
    if intake.seen != rows + rejected:
        raise RuntimeError(f"{intake.seen} records: {rows} became rows, {rejected} were rejected: rows were lost")
    for read in intake.sources:
        read.source.check()
        if not read.tally.records or read.tally.unreadable < read.tally.records:
            continue
        place = (read.dataset.name, read.source.place)
        first = next(r for r in intake.rejected() if (r.dataset, r.file) == place)
        none = f"none of its {read.tally.records} lines can be read (the first: {first.reason})"
        raise UserError(f"{read.source.uri} is not JSON: {none}")
