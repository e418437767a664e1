"""Router data: what the judge says about each row of a pool, on disk and in memory.

No command runs this module; `selectmoe route` and `selectmoe merge` write it, `select` and `report` read it.

A `router_data/` folder has one folder per dataset, an output of its own (manifest, identity), with N rows by id, L layers,
E experts, H hidden dimensions:

* `00000.safetensors`, float32: quality_score [N, L], good_ratio [N, L], the same two over answer tokens only
  (quality_score_answer, good_ratio_answer [N, L]; NaN for a row without answer tokens), router_probs [N, L, E],
  embedding [N, H]. A judge without gates has no scores, one without routers no router_probs, and only that one embeddings.
* `00000.parquet`: dataset, id, tokens, answer_tokens, truncated, nll, nll_unconditional (mean negative log-likelihood in
  nats per answer token, with and without the question; null where not asked for), answer_bytes (UTF-8), batch (of the plan).

What exceeds 256 MB goes on in `00001` and so on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import Manifest, read_manifest
from selectmoe.shards import read_header

FOLDER = "router_data"
STAGE = "route"
"""The stage in the manifest of complete router data, whether `route` wrote it in one go or `merge` from shards."""

SHARD = "route-shard-"
"""How the stage of a shard's manifest begins; the rest is INDEX-of-COUNT."""

TENSORS = {
    "quality_score": 1,
    "good_ratio": 1,
    "quality_score_answer": 1,
    "good_ratio_answer": 1,
    "router_probs": 2,
    "embedding": 1,
}
"""Name of a float32 tensor, and how many dimensions it has for one row."""
NUMBERS = {
    "tokens": np.int64,
    "answer_tokens": np.int64,
    "truncated": np.bool_,
    "nll": np.float64,
    "nll_unconditional": np.float64,
    "answer_bytes": np.int64,
    "batch": np.int64,
}
"""Columns of the Parquet file beside dataset and id."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass
class RouterData:
    """Router data of N rows, sorted by (dataset, id); L layers, E experts. NaN means: there is none.

    A tensor that the judge does not have has no element: [N, 0], or [N, 0, 0].
    """

    dataset: list[str]
    id: list[str]
    tokens: Ints
    """[N] valid tokens; -1: not known (the predecessor's files do not say)."""
    answer_tokens: Ints
    """[N] answer tokens among them; -1: not known."""
    truncated: npt.NDArray[np.bool_]
    """[N] whether the text was longer than max_length."""
    nll: npt.NDArray[np.float64]
    """[N] nats per answer token, given the question."""
    nll_unconditional: npt.NDArray[np.float64]
    """[N] nats per answer token, without the question."""
    answer_bytes: Ints
    """[N] UTF-8 bytes of the answers, whole even where truncated; -1: not known."""
    quality_score: Floats
    """[N, L] mean raw score."""
    good_ratio: Floats
    """[N, L] mean sigmoid of the score."""
    quality_score_answer: Floats
    """[N, L] over answer tokens."""
    good_ratio_answer: Floats
    """[N, L] over answer tokens."""
    router_probs: Floats
    """[N, L, E] mean softmax of the router logits."""
    batch: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N] the forward pass in which a row was read, counted in its dataset; -1 (default): not known."""
    embedding: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[N, H] weighted mean of the last hidden states, of a judge without routers; default: none."""

    def __post_init__(self) -> None:
        """Fill in what was not given."""
        if len(self.batch) != len(self):
            self.batch = np.full(len(self), -1)
        if len(self.embedding) != len(self):
            self.embedding = np.zeros((len(self), 0), np.float32)

    def __len__(self) -> int:
        return len(self.id)

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(dataset, id) per row."""
        return list(zip(self.dataset, self.id, strict=True))

    def take(self, rows: Sequence[int] | Ints) -> RouterData:
        """The given rows, in the given order."""
        at = np.asarray(rows, dtype=np.intp)
        columns: dict[str, Any] = {}
        for column in dataclasses.fields(self):
            value = getattr(self, column.name)
            columns[column.name] = [value[i] for i in at] if isinstance(value, list) else value[at]
        return RouterData(**columns)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie in a file."""

    path: Path
    shape: tuple[int, ...]
    offset: int


def locate(path: Path | str, shard: bool = False) -> Path:
    """The output that holds router data, given its folder or the `router_data/` in it. Cheap: verifies no bytes.

    Args:
        path: such a folder; or files of the predecessor (`selectmoe.legacy_router_data`), which are returned as they are.
        shard: whether one shard's data will do.

    Raises:
        UserError: it is neither, or one shard's partial data.
    """
    from selectmoe import legacy_router_data

    if files := legacy_router_data.find(Path(path)):
        return files
    output, manifest = _open(Path(path))
    if manifest.stage.startswith(SHARD) and not shard:
        share = manifest.stage.removeprefix(SHARD).replace("-of-", " of ")
        raise UserError(f"{path} holds shard {share} only: give all shards to `selectmoe merge` first")
    return output


def read_router_data(path: Path | str | Sequence[Path | str]) -> RouterData:
    """Read the router data of one output, or of several together.

    Args:
        path: an output of `route` or `merge`, the `router_data/` in it, one dataset of it, files of the predecessor, or a
            list of such.

    Returns:
        All rows, sorted by (dataset, id).

    Raises:
        UserError: no finished output, a missing, foreign or changed file, a shard's partial data, or a row twice.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    return together([part for place in paths for part in open_parts(locate(place), verify=True)])


def together(parts: Sequence[Part]) -> RouterData:
    """The rows of several files, sorted by (dataset, id).

    Raises:
        UserError: there is none, a row is there twice, or the judges have different shapes.
    """
    if not parts:
        raise UserError("there is no router data: no row was routed")
    shapes = sorted({tuple(sorted(part.shapes.items())) for part in parts})
    if len(shapes) > 1:
        found = [", ".join(f"{name} {list(shape)}" for name, shape in one) for one in shapes]
        raise UserError(f"router data of different judges: {found[0]} and {found[1]}")
    total = sum(part.rows for part in parts)
    columns: dict[str, Any] = {"dataset": [], "id": []}
    for name, dimensions in TENSORS.items():
        columns[name] = np.empty((total, *parts[0].shapes.get(name, (0,) * dimensions)), np.float32)
    numbers: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in NUMBERS}
    at = 0
    for part in parts:
        index = part.index()
        columns["dataset"] += index["dataset"]
        columns["id"] += index["id"]
        for name, found_numbers in numbers.items():
            found_numbers.append(index[name])
        for name in part.shapes:
            part.read_into(name, columns[name][at : at + part.rows])
        at += part.rows
    columns |= {name: np.concatenate(arrays) for name, arrays in numbers.items()}
    return _ordered(RouterData(**columns))


def _ordered(data: RouterData) -> RouterData:
    """The rows sorted by (dataset, id), each there once.

    Raises:
        UserError: a row is there twice.
    """
    keys = data.keys
    if all(a < b for a, b in pairwise(keys)):
        return data
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for a, b in pairwise(order):
        if keys[a] == keys[b]:
            raise UserError(
                f"row {keys[a][1]!r} of dataset {keys[a][0]!r} is there twice: is a shard or a folder named twice?"
            )
    return data.take(order)


def _open(path: Path) -> tuple[Path, Manifest]:
    if not path.exists():
        raise UserError(f"{path} does not exist; expected router data: the output of `selectmoe route` or `merge`")
    inside = path.name == FOLDER and not (path / MANIFEST).is_file() and (path.parent / MANIFEST).is_file()
    output = path.parent if inside else path
    manifest = read_manifest(output, verify=False)
    if manifest.stage != STAGE and not manifest.stage.startswith(SHARD):
        raise UserError(
            f"{output} is an output of stage {manifest.stage!r}; expected router data, from `route` or `merge`"
        )
    return output, manifest


def dataset_folders(output: Path) -> dict[str, Path]:
    """Dataset -> its folder, by name, for an output of `route` or `merge` or the folder of one dataset."""
    manifest = read_manifest(output, verify=False)
    names = sorted(part for part in manifest.parts if part.startswith(f"{FOLDER}/"))
    if not names and any(output.glob("*.parquet")):
        return {output.name: output}
    return {Path(name).name: output / name for name in names}


def open_parts(output: Path, verify: bool = False) -> list[Part]:
    """The files of an output, in order.

    Args:
        output: as `locate` returns it.
        verify: prove all bytes against the manifest first (the predecessor's files prove themselves).

    Raises:
        UserError: a file is missing beside another, a tensor or a column is missing, or their numbers of rows differ.
    """
    from selectmoe import legacy_router_data

    if files := legacy_router_data.files_of(output):
        return [legacy_router_data.LegacyPart.open(file) for file in files]
    if verify:
        read_manifest(output)
    return [part for folder in dataset_folders(output).values() for part in parts_of(folder)]


def parts_of(folder: Path) -> list[Part]:
    """The files of one dataset's folder, in order; errors as `open_parts`."""
    return [Part.open(file) for file in sorted(folder.glob("*.parquet"))]


@dataclass(frozen=True)
class Part:
    """One Parquet file of router data and the safetensors file beside it."""

    path: Path
    rows: int
    places: dict[str, _Place]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> its shape for one row."""
        return {name: place.shape[1:] for name, place in self.places.items()}

    @classmethod
    def open(cls, path: Path) -> Part:
        """Look at the files; nothing of the tensors is read.

        Raises:
            UserError: see `open_parts`.
        """
        import pyarrow.parquet as pq

        tensors = path.with_suffix(".safetensors")
        if not tensors.is_file():
            raise UserError(f"{tensors} is missing beside {path.name}")
        found = read_header(tensors)
        places = {name: _Place(tensor.path, tensor.shape, tensor.start) for name, tensor in found.items()}
        rows = pq.ParquetFile(path).metadata.num_rows
        if foreign := sorted(set(places) - set(TENSORS)):
            raise UserError(f"{tensors} holds {foreign[0]}: it is not router data of this version")
        for name, place in places.items():
            if place.shape[0] != rows:
                raise UserError(f"{path}: {rows} rows, but {place.shape[0]} in {name} of {tensors.name}")
        return cls(path, rows, places)

    def index(self) -> dict[str, Any]:
        """The columns: dataset and id as lists, numbers as arrays.

        Raises:
            UserError: a column is missing.
        """
        import pyarrow.parquet as pq

        table = pq.read_table(self.path)
        if missing := [name for name in ("dataset", "id", *NUMBERS) if name not in table.column_names]:
            raise UserError(f"{self.path}: {missing[0]} is missing: it is not router data of this version")
        columns: dict[str, Any] = {name: table[name].to_pylist() for name in ("dataset", "id")}
        for name, kind in NUMBERS.items():
            columns[name] = table[name].to_numpy().astype(kind, copy=False)
        return columns

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows `start` to `stop` of a tensor, read into memory."""
        found = np.empty(((self.rows if stop is None else stop) - start, *self.shapes[name]), np.float32)
        self.read_into(name, found, start)
        return found

    def read_into(self, name: str, target: Floats, start: int = 0) -> None:
        """Read rows from `start` on into an array that is contiguous, as many as it has."""
        place = self.places[name]
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.offset + 4 * start * math.prod(place.shape[1:]))
            view = target.reshape(-1).view(np.uint8).data
            while view:
                got = file.readinto(view)
                if not got:
                    raise UserError(f"{place.path} ends before the bytes that its header promises: copy it again")
                view = view[got:]
