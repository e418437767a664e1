"""The predecessor's router data: one `NAME_router_data.pt` per dataset, read like ours and written on request.

    selectmoe select router_data_dir=old/router_data score=legacy data=out/ingest output_dir=out/select
    selectmoe route export_legacy=true ...          # NAME_router_data.pt beside the native folders; `merge` does the same

A file is a dict, saved by torch: quality_score [N, L, 1] (mean raw score), moe_logits [N, L, E] (which holds the
*probabilities*), both bfloat16 or float32, sample_ids (N), dataset_name, num_samples, metadata. A folder of such files has
no manifest; its identity is its files' digests. What a file does not hold is absent: of the scores only `legacy` can be had.

A file from somebody else is data and never code: it is loaded with `weights_only=True`, its checksums are proved first,
and the tensors stay in the file until they are read.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import read_manifest
from selectmoe.pool import DATASET_NAME
from selectmoe.router_data import FOLDER, NUMBERS, Floats, Part, RouterData, parts_of

if TYPE_CHECKING:
    from torch import Tensor

    from selectmoe.pool import Row

SUFFIX = "_router_data.pt"
KEYS = ("quality_score", "moe_logits", "sample_ids", "dataset_name", "num_samples")
EXPORTED = f"{FOLDER}/*{SUFFIX}"
"""Where an output of `route` or `merge` has them."""
PICKLE_BYTES = 64 * 1024
"""What a file has beside tensors and ids, at most."""
ABSENT = {"truncated": False, "nll": np.nan, "nll_unconditional": np.nan}
"""What stands in a column of a file that does not hold it; a number that cannot be negative is -1."""


def find(path: Path) -> Path | None:
    """The file, or the folder of nothing but such files, that a user means; None where it is something else.

    Args:
        path: a file, its folder, or a folder around `router_data/`.

    Raises:
        UserError: such files lie beside others, and belong to no finished output.
    """
    if path.is_file():
        return path if path.name.endswith(SUFFIX) else None
    inside = path.name == FOLDER and (path.parent / MANIFEST).is_file()
    if not path.is_dir() or (path / MANIFEST).is_file() or inside:
        return None
    entries = sorted(path.iterdir())
    if not any(entry.name.endswith(SUFFIX) for entry in entries):
        return find(path / FOLDER) if (path / FOLDER).is_dir() else None
    if foreign := [entry for entry in entries if not entry.name.endswith(SUFFIX)]:
        raise UserError(
            f"{path} holds {foreign[0].name} beside NAME{SUFFIX}: a folder without a manifest must hold such files only "
            "(or name the one file)"
        )
    return path


def files_of(place: Path) -> list[Path]:
    """The files of what `find` found, by name; none for anything else."""
    if place.is_dir():
        found = [] if (place / MANIFEST).is_file() else sorted(place.glob(f"*{SUFFIX}"))
        return found
    return [place] if place.name.endswith(SUFFIX) else []


@dataclass(frozen=True)
class LegacyPart(Part):
    """One file, in the place of a Parquet file and its tensors; its places are empty."""

    dataset: str
    ids: list[str]
    score: Tensor
    """[N, L, 1] on disk"""
    probs: Tensor
    """[N, L, E] on disk"""

    @classmethod
    def open(cls, path: Path) -> LegacyPart:
        """Prove a file and look at it.

        Raises:
            UserError: it is damaged, holds something else than data, or what it holds does not fit together.
        """
        content = _load(path)
        score, probs, ids = content["quality_score"], content["moe_logits"], content["sample_ids"]
        name = content["dataset_name"]
        if not isinstance(name, str) or not DATASET_NAME.fullmatch(name):
            raise UserError(f"{path}: dataset_name {name!r} is no name of a dataset (letters, digits, . _ -)")
        if path.name != name + SUFFIX:
            raise UserError(f"{path} holds dataset {name!r}: is it renamed? Its name would be {name}{SUFFIX}")
        _check_tensors(path, score, probs)
        if not isinstance(ids, list) or not all(type(i) in (str, int) for i in ids):
            raise UserError(f"{path}: sample_ids must be a list of strings or whole numbers")
        texts = [str(i) for i in ids]
        if not len(texts) == len(score) == content["num_samples"]:
            found = f"{len(texts)} sample_ids, num_samples {content['num_samples']!r}"
            raise UserError(f"{path}: {len(score)} rows in quality_score, but {found}")
        if twice := [i for i, n in Counter(texts).items() if n > 1]:
            raise UserError(f"{path}: row {twice[0]!r} is there twice")
        return cls(path, len(texts), {}, name, texts, score, probs)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> its shape for one row."""
        return {"quality_score": (self.score.shape[1],), "router_probs": tuple(self.probs.shape[1:])}

    def index(self) -> dict[str, Any]:
        """The columns, as of `Part.index`."""
        columns: dict[str, Any] = {"dataset": [self.dataset] * self.rows, "id": list(self.ids)}
        return columns | {name: np.full(self.rows, ABSENT.get(name, -1), kind) for name, kind in NUMBERS.items()}

    def read_into(self, name: str, target: Floats, start: int = 0) -> None:
        """Read rows from `start` on into an array, in float32, as many as it has.

        Raises:
            UserError: moe_logits are no probabilities.
        """
        import torch

        rows = slice(start, start + len(target))
        torch.from_numpy(target).copy_(self.score[rows, :, 0] if name == "quality_score" else self.probs[rows])
        if name != "router_probs" or not target.size:
            return
        if np.fmin.reduce(target, axis=None) < 0 or np.fmax.reduce(target, axis=None) > 1.01:
            row = self.ids[start + int(np.argwhere((target < 0) | (target > 1.01))[0, 0])]
            raise UserError(f"{self.path}: moe_logits of row {row!r} are no probabilities (below 0 or above 1)")


def _load(path: Path) -> dict[str, Any]:
    """The dict in a file, its tensors mapped.

    Raises:
        UserError: it is damaged, or no such file.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(f"{path} is read with torch, which is not there: pip install 'select-moe[train]'") from None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something else than tensors, numbers and texts: it is not loaded") from None
    except (
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        OSError,
        NotImplementedError,
    ):
        raise UserError(f"{path} is damaged, or no file that torch saved") from None
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} in it does not fit")
    if not isinstance(content, dict) or (missing := [key for key in KEYS if key not in content]):
        what = f"{missing[0]} is missing" if isinstance(content, dict) else "it holds no dict"
        raise UserError(f"{path}: {what}; expected {', '.join(KEYS)}")
    return content


def _check_tensors(path: Path, score: Any, probs: Any) -> None:
    import torch

    for name, tensor, shape in (("quality_score", score, "[N, L, 1]"), ("moe_logits", probs, "[N, L, E]")):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"{path}: {name} must be a tensor in float32 or bfloat16")
        if tensor.layout is not torch.strided or tensor.dim() != 3 or not all(tensor.shape[1:]):
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}; expected {shape}")
    if score.shape != (*probs.shape[:2], 1):
        raise UserError(
            f"{path}: quality_score {list(score.shape)} and moe_logits {list(probs.shape)} do not fit: "
            "expected [N, L, 1] and [N, L, E]"
        )


def check_positions(data: RouterData, pool: Sequence[Row]) -> None:
    """Refuse to join imported rows whose ids are their positions with a pool in which these are other rows.

    The predecessor counted rows after it had taken a part of them: such an id may be that of another row by now.

    Args:
        data: router data, imported or not.
        pool: the rows that they are joined with by (dataset, id).

    Raises:
        UserError: the ids of an imported dataset are 0 to N-1, and the pool has more than N rows of it.
    """
    ids: dict[str, set[str]] = {}
    for dataset, row, tokens in zip(data.dataset, data.id, data.tokens.tolist(), strict=True):
        if tokens < 0:
            ids.setdefault(dataset, set()).add(row)
    rows = Counter(row.dataset for row in pool)
    for name, mine in ids.items():
        start = min(mine).rstrip("0123456789")
        if len(mine) < rows[name] and mine == {f"{start}{n}" for n in range(len(mine))}:
            raise UserError(
                f"the ids of dataset {name!r} in {name}{SUFFIX} are positions ({start}0 to {start}{len(mine) - 1}), and "
                f"the pool has {rows[name]} rows of it: which {len(mine)} they were cannot be told; "
                "give a pool of these rows only, or route again"
            )


def export(dataset: Path, target: Path) -> None:
    """Write one dataset's router data as the predecessor's file, in float32; the same bytes for the same router data.

    The probabilities go through a file on disk: memory holds one part of them at a time.

    Args:
        dataset: the folder of one dataset, finished.
        target: `NAME_router_data.pt`, not there yet; written wholly and then renamed.

    Raises:
        UserError: the judge has no gates or no routers, or a dataset has the name of the file.
    """
    import torch

    parts = parts_of(dataset)
    check_exportable(parts[0].shapes)
    if target.exists():
        raise UserError(f"dataset {target.name!r} has the name of the file that export_legacy writes: rename it")
    rows, shape = sum(part.rows for part in parts), parts[0].shapes["router_probs"]
    ids = [row for part in parts for row in part.index()["id"]]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        plain, whole = Path(folder, "probs"), Path(folder, "whole")
        with open(plain, "wb") as file:
            for part in parts:
                file.write(part.tensor("router_probs").data)
        probs: npt.NDArray[np.float32] = np.memmap(plain, np.float32, "c", shape=(rows, *shape))
        score = np.concatenate([part.tensor("quality_score") for part in parts])
        content = {
            "quality_score": torch.from_numpy(score[:, :, None]),
            "moe_logits": torch.from_numpy(probs),
            "sample_ids": ids,
            "dataset_name": dataset.name,
            "num_samples": rows,
            "metadata": {
                "num_layers": shape[0],
                "num_experts": shape[1],
                "identity": read_manifest(dataset, verify=False).identity,
            },
        }
        texts = sum(len(row.encode("utf-8", "surrogatepass")) + 16 for row in ids)
        with open(whole, "wb") as file:  # an open file: given its name, torch would write that into the bytes
            os.posix_fallocate(file.fileno(), 0, probs.nbytes + score.nbytes + texts + PICKLE_BYTES)  # or it is full
            torch.save(content, file)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        whole.rename(target)


def check_exportable(shapes: Any) -> None:
    """Refuse what the predecessor's file cannot hold.

    Args:
        shapes: the judge's tensors, by name.

    Raises:
        UserError: there are no scores or no routing probabilities.
    """
    if missing := [name for name in ("quality_score", "router_probs") if name not in shapes]:
        raise UserError(f"export_legacy=true needs a judge with gates and routers: there is no {missing[0]}")


def export_all(staging: Path) -> None:
    """Write the files of every dataset in `router_data/` of an output, beside their folders."""
    for folder in [path for path in sorted((staging / FOLDER).iterdir()) if path.is_dir()]:
        export(folder, staging / FOLDER / f"{folder.name}{SUFFIX}")
