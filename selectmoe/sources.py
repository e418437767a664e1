"""Where rows come from: every dataset as a list of sources, each a file or a stream, opened where it is read.

No command runs this module; `ingest` and `check` find their datasets through it. What crosses the seam:

* `Source`: the bytes of one file. Kind and compression are known by its name; `open` gives a binary file that can seek
  (a plain `.jsonl` is read in ranges, by several processes at the same time; the others are read from their beginning).
* `Stream`: records, for what has no bytes of its own (a data set that a library reads). Several streams of a dataset,
  such as its shards, are read at the same time.
* `Dataset`: a name, its sources in a fixed order, and what identifies it: `uri` and `identify()` become the entry in the
  manifest's inputs. `identify` is called once, before anything is read, and says what will be read: by content
  digests, or by a revision that cannot change. `check` of a source says afterwards whether it was that.

A further kind of place is a module with such a class and a function that returns `Dataset`s by name, and a line in `find`.
Sources are pickled on their way to the worker processes: they hold names and numbers, and connect in `open` or `records`.
Mistakes of the user's are raised as UserError, servers that do not answer as Unavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from selectmoe import cache
from selectmoe.config import execution, group, identity, input_
from selectmoe.errors import UserError
from selectmoe.formats import schema
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import digest, tree_identity
from selectmoe.pool import DATASET_NAME


@dataclass
class LocalConfig:
    """Datasets on this machine."""

    data_dir: str = input_("dataset/train/processed", doc="folder with one dataset per subfolder or file; unless data=")
    dataset_names: list[str] = identity([], doc="datasets to take; default: every one there is, by name")


@dataclass
class S3Config:
    """Datasets on S3 (`selectmoe.sources_s3`)."""

    data_dir: str = input_("", doc="s3://bucket/prefix with one dataset per folder or object; unless data=")
    dataset_names: list[str] = identity([], doc="datasets to take; default: every one there is, by name")
    download: bool = execution(False, doc="bring the objects to the cache first: for a slow network and a large disk")


@dataclass
class HfConfig:
    """Datasets on the Hugging Face hub (`selectmoe.sources_hf`)."""

    datasets: list[dict[str, str]] = input_(
        [{"path": "teknium/OpenHermes-2.5", "name": "openhermes", "split": "train"}],
        doc="datasets to take: of each path (OWNER/NAME), name, split (train), config and revision where there are several",
    )


@dataclass
class DatasetConfig:
    """Which datasets, and how much of each."""

    dataset_from: str = input_("local", doc="where the datasets lie: local, s3 or hf; unless data=")
    local: LocalConfig = group(LocalConfig)
    s3: S3Config = group(S3Config)
    hf: HfConfig = group(HfConfig)
    schema: str = identity(
        "", doc="format of all records: messages, sharegpt, alpaca, dolly, or keys as QUESTION/ANSWER; default: found"
    )
    schemas: dict[str, str] = identity({}, doc="the same by dataset, as in {cot: alpaca}; wins over schema")
    subset_ratio: float = identity(1.0, doc="share of every dataset that is taken, drawn by a hash of the contents")
    shuffle: bool = identity(
        True,
        doc="subset_ratio and limits draw by seed; false: the same rows for every seed (a pool's order is its ids')",
    )
    limit: int | None = identity(None, doc="rows of every dataset at most; default: all")
    limits: dict[str, int] = identity({}, doc="the same by dataset, as in {cot: 1000}; wins over limit")
    weights: dict[str, float] = identity(
        {}, doc="relative sizes of all datasets, as in {cot: 2, dolly: 1}: as many rows as the shares allow"
    )

    def validate(self) -> None:
        """Check names and ranges.

        Raises:
            UserError: one is unknown, or out of its range.
        """
        self._check_places()
        if self.schema:
            schema(self.schema, "dataset.schema")
        for name, wanted in self.schemas.items():
            schema(wanted, f"dataset.schemas.{name}")
        if not 0 < self.subset_ratio <= 1:
            raise UserError(f"dataset.subset_ratio={self.subset_ratio} must be above 0 and at most 1")
        limits = {"limit": self.limit} | {f"limits.{name}": limit for name, limit in self.limits.items()}
        if bad := [f"dataset.{key}={limit}" for key, limit in limits.items() if limit is not None and limit < 1]:
            raise UserError(f"{bad[0]} must be at least 1")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"dataset.weights.{name}={weight} must be above 0, and finite")

    def place(self, data: str) -> str:
        """Where the datasets lie, for messages; `data` takes the place of everything else."""
        places = {"local": self.local.data_dir, "s3": self.s3.data_dir, "hf": "dataset.hf.datasets"}
        return data or places[self.dataset_from]

    def _check_places(self) -> None:
        from selectmoe.sources_hf import check_entries

        if self.dataset_from not in ("local", "s3", "hf"):
            raise UserError(f"dataset.dataset_from={self.dataset_from} is unknown; known: local, s3, hf")
        check_entries(self.hf.datasets)
        if self.s3.data_dir and not self.s3.data_dir.startswith("s3://"):
            raise UserError(f"dataset.s3.data_dir={self.s3.data_dir} is not of the form s3://bucket/prefix")


COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = (".jsonl", ".json", ".parquet")


def kind_of(path: Path) -> str:
    """`.jsonl`, `.json` or `.parquet`, seen through a compression's suffix; empty for any other file."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".json") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def compression_of(path: Path) -> str:
    """`gzip` or `zstd`, by a file's name; empty for a file that is not compressed."""
    return COMPRESSIONS.get(path.suffix.lower(), "")


def stem_of(path: Path) -> str:
    """A file's name without the suffixes that say its kind and compression."""
    name = path.name
    for suffix in [*COMPRESSIONS, *KINDS]:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


@runtime_checkable
class Source(Protocol):
    """The bytes of one file of rows, wherever it lies."""

    @property
    def place(self) -> str:
        """Its name inside of its dataset, such as `sub/b.jsonl`: what rejected rows and reports call it."""

    @property
    def uri(self) -> str:
        """Where it lies, as errors call it."""

    @property
    def kind(self) -> str:
        """`.jsonl`, `.json` or `.parquet`."""

    @property
    def compression(self) -> str:
        """`gzip`, `zstd`, or empty."""

    @property
    def size(self) -> int:
        """Bytes as they lie there."""

    def open(self, end: int | None = None) -> IO[bytes]:
        """The bytes; can seek, and may be opened several times at once.

        Args:
            end: where reading is going to end, so that little beyond it is fetched ahead; it can be read all the same.

        Raises:
            UserError, Unavailable, OSError: it cannot be read.
        """

    def check(self) -> None:
        """Called when all of it was read.

        Raises:
            UserError: it is not, or no longer, what `Dataset.identify` identified.
        """


@runtime_checkable
class Stream(Protocol):
    """Records that a library reads."""

    @property
    def place(self) -> str:
        """As of a `Source`."""

    @property
    def uri(self) -> str:
        """As of a `Source`."""

    def records(self) -> Iterator[Mapping[str, Any]]:
        """Every record, in an order that never changes.

        Raises:
            UserError, Unavailable: it cannot be read.
        """

    def check(self) -> None:
        """As of a `Source`."""


@dataclass(frozen=True)
class Dataset:
    """One dataset that is to be read."""

    name: str
    uri: str
    """Where it lies."""
    identify: Callable[[], str]
    """The digest or revision of what will be read; may take as long as reading it."""
    sources: Sequence[Source | Stream]
    several: bool = False
    """Whether its rows may say in a field `dataset` that they are from another one."""

    def entry(self) -> dict[str, str]:
        """URI and identity, as in a manifest's inputs."""
        return {"uri": self.uri, "identity": self.identify()}


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path
    place: str
    kind: str
    compression: str
    size: int
    modified: int
    """Its time stamp in nanoseconds when it was found."""

    @property
    def uri(self) -> str:
        """Its path."""
        return str(self.path)

    def open(self, end: int | None = None) -> IO[bytes]:
        """The file's bytes."""
        return self.path.open("rb")

    def check(self) -> None:
        """Refuse a file that was written to while it was read."""
        found = self.path.stat()
        if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
            raise UserError(f"{self.path} was changed while it was read: start again")


def local_file(path: Path, place: str = "") -> LocalFile:
    """A file of rows as a source.

    Args:
        path: of a known kind.
        place: its name inside of its dataset; default: the file's.
    """
    found = path.stat()
    return LocalFile(path, place or path.name, kind_of(path), compression_of(path), found.st_size, found.st_mtime_ns)


def find(data: str, config: DatasetConfig) -> dict[str, Dataset]:
    """The datasets that are asked for, by name.

    Args:
        data: a file or folder that takes the place of `dataset.*`; empty: `config` says where.
        config: where the datasets lie.

    Raises:
        UserError: nothing is there, a dataset that is named is not, a name cannot be a file name, two have one name, or
            the folder is an output of `ingest` already.
        Unavailable: a server does not answer, after retries.
    """
    given, key = config.place(data), "data" if data else f"dataset.{config.dataset_from}.data_dir"
    if not given:
        raise UserError("dataset.dataset_from=s3 needs dataset.s3.data_dir=s3://bucket/prefix")
    if not data and config.dataset_from == "hf":
        from selectmoe.sources_hf import hub_datasets

        return hub_datasets(config.hf.datasets)
    if given.startswith("s3://"):
        from selectmoe.sources_s3 import s3_datasets

        names = config.s3.dataset_names or config.local.dataset_names
        if config.s3.download:
            return local_datasets(cache.locate(given, key)[0], key, names)
        return s3_datasets(given, key, names)
    if given.startswith("hf://"):
        from selectmoe.sources_hf import one_dataset

        return one_dataset(given)
    return local_datasets(Path(given), key, config.local.dataset_names)


def data_identity(data: str) -> str:
    """The identity of everything at a place that `data=` may name, whatever is made of it.

    Raises:
        UserError: there is nothing.
        Unavailable: a server does not answer, after retries.
    """
    if data.startswith("s3://"):
        from selectmoe.sources_s3 import data_identity as on_s3

        return on_s3(data, "data")
    if data.startswith("hf://"):
        from selectmoe.sources_hf import one_dataset

        return digest(sorted(found.identify() for found in one_dataset(data).values()))
    return tree_identity(data)


def local_datasets(root: Path, key: str, names: Sequence[str] = ()) -> dict[str, Dataset]:
    """The datasets in a folder, or in a file.

    Args:
        root: the file or folder.
        key: the configuration key that named it, for messages.
        names: which datasets; default: all.

    Raises:
        UserError: as `find`.
    """
    if not root.exists():
        raise UserError(f"{key}={root} does not exist: name a file of rows, or a folder of datasets")
    if (root / MANIFEST).is_file():
        raise UserError(f"{key}={root} is an output of Select-MoE already: give it to the next stage as data=")
    if root.is_file() and not kind_of(root):
        raise UserError(f"{key}={root} is none of .jsonl, .json (either also .gz or .zst) and .parquet")
    found: dict[str, Path] = {}
    for entry in [root] if root.is_file() else [p for p in sorted(root.iterdir()) if not p.name.startswith(".")]:
        if entry.is_file() and not kind_of(entry):
            continue
        name = stem_of(entry) if entry.is_file() else entry.name
        if name in found:
            raise UserError(f"{found[name]} and {entry} are both called {name}: rename one")
        found[name] = entry
    wanted = check_names(names, found, str(root))
    if not wanted:
        raise UserError(
            f"{key}={root} holds no dataset: expected NAME/*.jsonl or NAME.jsonl (also .json, .parquet, .gz)"
        )
    return {name: _local_dataset(name, found[name]) for name in wanted}


def check_names(names: Sequence[str], found: Sequence[str] | Mapping[str, Any], place: str) -> list[str]:
    """The names of the datasets to take, each once, sorted.

    Args:
        names: those that are asked for; none: all.
        found: those that are there.
        place: where, for messages.

    Raises:
        UserError: one is not there, or cannot be a dataset's name.
    """
    wanted = sorted(set(names or found))
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"dataset {missing[0]!r} is not in {place}; there are: {', '.join(sorted(found)) or 'none'}")
    if bad := [name for name in wanted if not DATASET_NAME.fullmatch(name)]:
        raise UserError(
            f"dataset name {bad[0]!r} must be 1 to 64 of A-Z a-z 0-9 . _ - and not begin with a dot: rename it"
        )
    return wanted


def _local_dataset(name: str, path: Path) -> Dataset:
    files = [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
        files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise UserError(f"{path} holds no .jsonl, .json or .parquet file")
    places = [p.name if path.is_file() else p.relative_to(path).as_posix() for p in files]
    sources = [local_file(file, place) for file, place in zip(files, places, strict=True)]
    return Dataset(name, str(path), lambda: tree_identity(path), sources, several=path.is_file())
