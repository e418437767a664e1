"""Names of arms, the folders that hold them, and `selected_data.jsonl`: what `select` writes and later stages read.

No command runs this module. An arm is METHOD or METHOD-SCORE (`top-nll`, `kmeans-ifd`), or one of three short names:
`selected` (the project's own choice), `legacy` (the predecessor's) and `nll` (`top-nll`). Settings may follow a method,
as KEY-VALUE after a plus sign: `kmeans-nll+drop-0.2+layers-0.1` (numbers of layers separated by points).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.kmeans import CHUNK, GRID, Rows
from selectmoe.manifest import read_manifest
from selectmoe.pool import Row
from selectmoe.scores import SCORES

FILE = "selected_data.jsonl"
CLUSTERS = "clusters.parquet"
CONFIG = "selection_config.yaml"
METHODS = ("kmeans", "top", "random", "balanced_random", "length", "router_only", "oracle")
CLUSTERED = ("kmeans", "router_only")
"""Methods that cluster the rows by their routing."""
SCORED = ("kmeans", "top")
"""Methods that a score changes, hence those that METHOD-SCORE is made of."""
DRAWN = ("random", "balanced_random", "oracle")
"""Methods that draw: every training seed of such an arm has a sample of its own."""


@dataclass(frozen=True)
class Arm:
    """What an arm's name stands for; `name` is the folder's name without a seed."""

    name: str
    method: str
    score: str = "answer"
    picking: str = "coverage"
    settings: tuple[tuple[str, Any], ...] = ()
    """Dotted keys of `select` and their values."""

    def folder(self, seed: int) -> str:
        """ARM, or ARM-SEED where the arm draws per seed."""
        return f"{self.name}-{seed}" if self.method in DRAWN else self.name


SHORT = {
    "selected": Arm("selected", "kmeans"),
    "legacy": Arm("legacy", "kmeans", "legacy", "legacy"),
    "nll": Arm("nll", "top", "nll"),
}


def _layers(text: str) -> list[int]:
    return [int(number) for number in text.split(".")]


SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "k": ("clustering_params.k", int),
    "drop": ("filter.drop", float),
    "allocation": ("allocation", str),
    "pick": ("pick", str),
    "picking": ("picking", str),
    "layers": ("layers", _layers),
    "budget": ("budget", str),
}
"""Setting of an arm -> key of `select` (budget: of `run`), and how its value is read."""


def parse_arm(name: str) -> Arm:
    """The arm of a name.

    Raises:
        UserError: no such arm, or no such setting; lists what there is.
    """
    if name in SHORT:
        return SHORT[name]
    base, *words = name.split("+")
    settings = tuple(_setting(name, word) for word in words)
    method, dash, score = base.partition("-")
    picking = dict(settings).get("picking", "coverage")
    if method in METHODS and not dash:
        return Arm(name, method, picking=picking, settings=settings)
    if method in SCORED and score in SCORES:
        return Arm(name, method, score, picking, settings)
    raise UserError(
        f"arm {name!r} is unknown: an arm is one of {', '.join([*SHORT, *METHODS])}, "
        f"or {' or '.join(SCORED)} with a score ({', '.join(SCORES)}), as in top-nll; "
        f"settings may follow a method, as in kmeans+drop-0.2 ({', '.join(SETTINGS)})"
    )


def _setting(arm: str, word: str) -> tuple[str, Any]:
    key, _, value = word.partition("-")
    if key not in SETTINGS:
        raise UserError(f"arm {arm!r}: no setting {key!r}; known: {', '.join(SETTINGS)}")
    dotted, read = SETTINGS[key]
    try:
        return dotted, read(value)
    except ValueError:
        raise UserError(f"arm {arm!r}: {key}-{value} is no value of {key}, as in kmeans+drop-0.2+layers-0.1") from None


def arm_directory(root: Path | str, arm: str, seed: int) -> Path:
    """The select output of an arm: `root` itself, or the folder in it that belongs to arm and seed.

    Args:
        root: an output of `select` made for this arm, or of `baseline`.
        arm: its name.
        seed: the training seed; counts where the arm draws per seed.

    Raises:
        UserError: the arm (or its seed) is not there.
    """
    root, parsed = Path(root), parse_arm(arm)
    if not root.is_dir():
        raise UserError(f"selection {root} does not exist: give the output_dir of select or baseline")
    if (root / FILE).is_file():
        made = read_manifest(root, verify=False).config["identity"]
        wanted: dict[str, str | int] = {"method": parsed.method}
        if parsed.method in SCORED:
            wanted["score"] = parsed.score
        if parsed.method in CLUSTERED:
            wanted["picking"] = parsed.picking
        if parsed.method in DRAWN:
            wanted |= {"seed": seed}
        if differs := [f"{k}={made.get(k)!r}, not {v!r}" for k, v in wanted.items() if made.get(k) != v]:
            raise UserError(f"{root} is not a selection of arm {arm} (seed {seed}): it has {'; '.join(differs)}")
        return root
    found = root / parsed.folder(seed)
    if not (found / FILE).is_file():
        there = sorted(path.parent.name for path in root.glob(f"*/{FILE}"))
        raise UserError(f"{root} has no {found.name}/{FILE}; it has {', '.join(there) or 'no selection at all'}")
    return found


@dataclass(frozen=True, slots=True)
class Selected:
    """A selected row, in pick order.

    Attributes:
        row: dataset, id and messages.
        scores: every score that the row has, by name; higher is better.
        cluster: its cluster; None for methods without clusters.
        rank: its rank in the cluster, from 1; None for methods without clusters.
    """

    row: Row
    scores: dict[str, float]
    cluster: int | None
    rank: int | None

    def json(self) -> str:
        """One line of `selected_data.jsonl`, without the newline."""
        record = {
            "dataset": self.row.dataset,
            "id": self.row.id,
            "scores": self.scores,
            "messages": self.row.messages,
            "cluster": self.cluster,
            "rank": self.rank,
        }
        return json.dumps(record, ensure_ascii=False, allow_nan=False)


def read_selected(path: Path | str) -> list[Selected]:
    """The rows of a `selected_data.jsonl` in pick order.

    Args:
        path: the file, or the select output that holds it.

    Raises:
        UserError: no such file, no rows, a doubled row, or a line that is not such a row (named).
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a {FILE} or the folder of a selection")
    rows: list[Selected] = []
    seen: set[tuple[str, str]] = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                item = _selected(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not a selected row ({error!r})") from None
            key = (item.row.dataset, item.row.id)
            if key in seen:
                raise UserError(f"{path}, line {number}: row {key[0]}/{key[1]} is there twice")
            seen.add(key)
            rows.append(item)
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def _selected(record: dict[str, Any]) -> Selected:
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
    if not messages:
        raise ValueError("messages is empty")
    row = Row(str(record["dataset"]), str(record["id"]), messages)
    return Selected(row, dict(record.get("scores") or {}), record.get("cluster"), record.get("rank"))


def write_selected(path: Path, rows: Iterable[Selected]) -> None:
    """Write `selected_data.jsonl`, one row a line, in the order given."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(row.json() + "\n" for row in rows)


def write_clusters(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `clusters.parquet`: one line per routed row, by (dataset, id).

    Args:
        path: the file.
        columns: dataset, id (str); cluster (int; None: was not clustered), score (None: has none), distance (1 - cos to
            the own centre), selected_rank (from 1, in pick order; None: not selected), x, y (map; None: no features).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, whole, real = pa.string(), pa.int32(), pa.float64()
    types = [text, text, whole, real, real, whole, pa.float32(), pa.float32()]
    names = ["dataset", "id", "cluster", "score", "distance", "selected_rank", "x", "y"]
    arrays = [pa.array(columns[name], kind) for name, kind in zip(names, types, strict=True)]
    pq.write_table(
        pa.table(dict(zip(names, arrays, strict=True))), path, compression="zstd", version="2.6", store_schema=False
    )


def write_config(path: Path, groups: Mapping[str, Any]) -> None:
    """Write `selection_config.yaml` in plain YAML that a safe loader reads, groups in the order given."""
    import yaml

    path.write_text(yaml.safe_dump(dict(groups), sort_keys=False, allow_unicode=True), encoding="utf-8")


def planted_file(planted: str) -> Path:
    """`planted.jsonl` in ingest's output, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(planted)
    path = path / "planted.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: planted= takes planted.jsonl, or the output_dir of an ingest that planted"
        )
    return path


def read_planted(path: Path) -> set[tuple[str, str]]:
    """The (dataset, id) of the rows that were planted.

    Raises:
        UserError: a line is not such a record (named).
    """
    keys = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            keys.add((str(record["dataset"]), str(record["id"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a planted row ({error!r})") from None
    return keys


def project(rows: Rows) -> npt.NDArray[np.float32]:
    """[N, 2] float32: the unit rows on their first two principal components, for a map of the clusters.

    Same bytes at any thread count: the covariance comes from coordinates rounded to 2^-13, which float64 multiplies and
    adds exactly; its eigenvectors from 200 steps of power iteration without BLAS. The sign: largest loading positive.
    """
    n, d = rows.fixed.shape
    second = np.zeros((d, d))
    for start in range(0, n, CHUNK):
        block = np.rint(rows.fixed[start : start + CHUNK] * (2.0**13 / GRID)) / 2.0**13
        second += block.T @ block
    mean = rows.fixed.sum(axis=0, dtype=np.int64) / (GRID * n)
    covariance = second / n - mean[:, None] * mean
    out = np.zeros((n, 2), np.float32)
    for axis in range(min(2, d)):
        vector = covariance[int(np.argmax(np.diagonal(covariance)))].copy()
        for _ in range(200):
            norm = np.sqrt((vector * vector).sum())
            if norm < 1e-12:
                return out
            vector = (covariance * (vector / norm)).sum(axis=1)
        value = np.sqrt((vector * vector).sum())
        vector /= value
        vector *= np.sign(vector[int(np.argmax(np.abs(vector)))])
        for start in range(0, n, CHUNK):
            block = rows.fixed[start : start + CHUNK] * (1 / GRID) - mean
            out[start : start + CHUNK, axis] = (block * vector).sum(axis=1)
        covariance = covariance - value * vector[:, None] * vector
    return out
