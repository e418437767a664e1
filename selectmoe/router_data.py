"""Router data: what the judge says about each row of a pool, on disk and in memory.

No command runs this module; `selectmoe route` and `selectmoe merge` write it, `select` and `report` read it.

A `router_data/` folder holds per dataset NAME (N rows by id, L layers, E experts):

* `NAME.safetensors`, float32: quality_score [N, L], good_ratio [N, L], the same two over answer tokens only
  (quality_score_answer, good_ratio_answer [N, L]; NaN for a row without answer tokens), router_probs [N, L, E];
* `NAME.parquet`: dataset, id, tokens, answer_tokens, truncated, nll, nll_unconditional (mean negative log-likelihood in
  nats per answer token, with and without the question; null where not asked for), answer_bytes (UTF-8).

What exceeds `PART_BYTES` goes on in `NAME@1`, `NAME@2` and so on (no dataset's name holds an `@`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import Manifest, read_manifest

FOLDER = "router_data"
STAGE = "route"
"""The stage in the manifest of complete router data, whether `route` wrote it in one go or `merge` from shards."""

SHARD = "route-shard-"
"""How the stage of a shard's manifest begins; the rest is INDEX-of-COUNT."""

PART_BYTES = 256 * 2**20
"""Bytes of float32 per safetensors file, at most (a single row is never split)."""

TENSORS = (
    "quality_score",
    "good_ratio",
    "quality_score_answer",
    "good_ratio_answer",
    "router_probs",
)

Floats = npt.NDArray[np.float32]


@dataclass
class RouterData:
    """Router data of N rows, sorted by (dataset, id); L layers, E experts. NaN means: there is none."""

    dataset: list[str]
    id: list[str]
    tokens: npt.NDArray[np.int64]
    """[N] valid tokens."""
    answer_tokens: npt.NDArray[np.int64]
    """[N] answer tokens among them."""
    truncated: npt.NDArray[np.bool_]
    """[N] whether the text was longer than max_length."""
    nll: npt.NDArray[np.float64]
    """[N] nats per answer token, given the question."""
    nll_unconditional: npt.NDArray[np.float64]
    """[N] nats per answer token, without the question."""
    answer_bytes: npt.NDArray[np.int64]
    """[N] UTF-8 bytes of the answers, whole even where truncated."""
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

    def __len__(self) -> int:
        return len(self.id)

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(dataset, id) per row."""
        return list(zip(self.dataset, self.id, strict=True))

    def take(self, rows: Sequence[int]) -> RouterData:
        """The given rows, in the given order."""
        at = np.asarray(rows, dtype=np.intp)
        columns: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            columns[field.name] = [value[i] for i in at] if isinstance(value, list) else value[at]
        return RouterData(**columns)


def concatenate(parts: Sequence[RouterData]) -> RouterData:
    """All rows of several, sorted by (dataset, id).

    Raises:
        UserError: there is none, a row is there twice, or the judges have different shapes.
    """
    if not parts:
        raise UserError("there is no router data: no row was routed")
    shapes = sorted({part.router_probs.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise UserError(f"router data of different judges: layers x experts {shapes[0]} and {shapes[1]}")
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(RouterData):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = [x for v in values for x in v] if isinstance(values[0], list) else np.concatenate(values)
    whole = RouterData(**columns)
    keys = whole.keys
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for a, b in itertools.pairwise(order):
        if keys[a] == keys[b]:
            raise UserError(
                f"row {keys[a][1]!r} of dataset {keys[a][0]!r} is there twice: is a shard or a folder named twice?"
            )
    return whole.take(order)


def write_router_data(directory: Path, data: RouterData) -> None:
    """Write router data, one pair of files per dataset; equal data give equal bytes.

    Args:
        directory: an existing folder without these datasets.
        data: rows in any order.
    """
    keys = data.keys
    rows_of: dict[str, list[int]] = {}
    for i in sorted(range(len(keys)), key=keys.__getitem__):
        rows_of.setdefault(keys[i][0], []).append(i)
    row_bytes = 4 * sum(int(np.prod(getattr(data, name).shape[1:])) for name in TENSORS)
    step = max(1, PART_BYTES // max(1, row_bytes))
    for dataset, rows in rows_of.items():
        for part, start in enumerate(range(0, len(rows), step)):
            name = f"{dataset}@{part}" if part else dataset
            _write_part(directory, name, data.take(rows[start : start + step]))


def _write_part(directory: Path, name: str, data: RouterData) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    tensors = {tensor: np.ascontiguousarray(getattr(data, tensor), dtype=np.float32) for tensor in TENSORS}
    save_file(tensors, directory / f"{name}.safetensors")
    table = pa.table(
        {
            "dataset": pa.array(data.dataset, pa.string()),
            "id": pa.array(data.id, pa.string()),
            "tokens": pa.array(data.tokens, pa.int64()),
            "answer_tokens": pa.array(data.answer_tokens, pa.int64()),
            "truncated": pa.array(data.truncated, pa.bool_()),
            "nll": pa.array(data.nll, pa.float64(), from_pandas=True),
            "nll_unconditional": pa.array(data.nll_unconditional, pa.float64(), from_pandas=True),
            "answer_bytes": pa.array(data.answer_bytes, pa.int64()),
        }
    )
    pq.write_table(
        table,
        directory / f"{name}.parquet",
        compression="zstd",
        version="2.6",
        store_schema=False,
    )


def locate(path: Path | str) -> Path:
    """The output that holds router data, given its folder or the `router_data/` in it. Cheap: verifies no bytes.

    Raises:
        UserError: it is neither, or one shard's partial data.
    """
    output, manifest = _open(Path(path), verify=False)
    if manifest.stage.startswith(SHARD):
        share = manifest.stage.removeprefix(SHARD).replace("-of-", " of ")
        raise UserError(f"{path} holds shard {share} only: give all shards to `selectmoe merge` first")
    return output


def read_router_data(path: Path | str | Sequence[Path | str]) -> RouterData:
    """Read the router data of one output, or of several together.

    Args:
        path: an output of `route` or `merge`, the `router_data/` in it, or a list of such.

    Returns:
        All rows, sorted by (dataset, id).

    Raises:
        UserError: no finished output, a missing, foreign or changed file, a shard's partial data, or a row twice.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    parts = []
    for place in paths:
        folder = data_folder(_open(locate(place), verify=True)[0])
        parts += [read_part(file) for file in part_files(folder)]
    return concatenate(parts)


def _open(path: Path, verify: bool) -> tuple[Path, Manifest]:
    if not path.exists():
        raise UserError(f"{path} does not exist; expected router data: the output of `selectmoe route` or `merge`")
    inside = path.name == FOLDER and not (path / MANIFEST).is_file() and (path.parent / MANIFEST).is_file()
    output = path.parent if inside else path
    manifest = read_manifest(output, verify=verify)
    if manifest.stage != STAGE and not manifest.stage.startswith(SHARD):
        raise UserError(
            f"{output} is an output of stage {manifest.stage!r}; expected router data, from `route` or `merge`"
        )
    return output, manifest


def data_folder(output: Path) -> Path:
    """The folder with the files: `router_data/` in the output, or the output itself."""
    return output / FOLDER if (output / FOLDER).is_dir() else output


def part_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder of router data, sorted by name."""
    return sorted(folder.glob("*.parquet"))


def dataset_of(file: Path) -> str:
    """The dataset that a file of router data belongs to."""
    return file.stem.split("@")[0]


def read_part(file: Path) -> RouterData:
    """Read one Parquet file of router data and the safetensors file beside it.

    Raises:
        UserError: a column or tensor is missing, or their numbers of rows differ.
    """
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    tensors = file.with_suffix(".safetensors")
    if not tensors.is_file():
        raise UserError(f"{tensors} is missing beside {file.name}")
    columns: dict[str, Any] = pq.read_table(file).to_pydict()
    columns |= load_file(tensors)
    known = [field.name for field in dataclasses.fields(RouterData)]
    if missing := [name for name in known if name not in columns]:
        raise UserError(f"{file}: {missing[0]} is missing: it is not router data of this version")
    for name, dtype in {
        "tokens": np.int64,
        "answer_tokens": np.int64,
        "answer_bytes": np.int64,
        "truncated": bool,
    }.items():
        columns[name] = np.array(columns[name], dtype=dtype)
    for name in ("nll", "nll_unconditional"):
        columns[name] = np.array([np.nan if x is None else x for x in columns[name]], dtype=np.float64)
    lengths = {name: len(columns[name]) for name in known}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{file}: {lengths['id']} rows, but {lengths['router_probs']} in {tensors.name}")
    return RouterData(**{name: columns[name] for name in known})
