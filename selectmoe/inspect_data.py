"""Router data in numbers: gates, experts, entropies, lengths, scores and work, of outputs of any size.

No command runs this module; `selectmoe inspect` does. One dataset after the other is read, in pieces of `CHUNK_BYTES`; of a
row, what stays in memory is one number per score and its lengths (some 30 bytes), of a layer a fine histogram. Quantiles
of gates and entropies are read from these histograms, exact to 1 in 16,384; those of rows are exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe import router_data as rd
from selectmoe.errors import UserError
from selectmoe.legacy_router_data import LegacyPart, files_of
from selectmoe.manifest import read_manifest
from selectmoe.progress import progress
from selectmoe.router_data import Part, RouterData
from selectmoe.scores import SCORES, mean_ranks, table

PLAN, UNITS = "plan.json", "units.jsonl"
CHUNK_BYTES = 16 << 20
"""Bytes of routing probabilities that are looked at together."""
BINS = 1 << 14
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
GATES = {
    "good_ratio_answer": "good ratio of answer tokens",
    "good_ratio": "good ratio of all tokens",
    "quality_score": "sigmoid of the mean raw score of all tokens",
}
"""Tensors that say what the gates say, the best first, and what is shown of them."""
DEAD, RARE = 0.01, 0.1
"""An expert's mean probability below which it is called dead, or rare, as a share of an even one (1 / E)."""
SLOWEST = 10
SINGLE = tuple(name for name in SCORES if name != "combined")
"""Scores that say something of a row by itself; a rank among the others is none."""

Floats = npt.NDArray[np.float64]


class Spread:
    """Values in [0, 1], a histogram per layer."""

    def __init__(self, layers: int) -> None:
        self.counts = np.zeros((layers, BINS), np.int64)
        self.sums = np.zeros((2, layers))

    def add(self, values: Floats) -> None:
        """Take values [n, L]; NaN is none."""
        layers = len(self.counts)
        there = np.isfinite(values)
        at = np.clip(np.where(there, values, 0) * BINS, 0, BINS - 1).astype(np.int64) + np.arange(layers) * BINS
        self.counts += np.bincount(at[there], minlength=layers * BINS).reshape(layers, BINS)
        self.sums += np.nansum(values, axis=0), np.nansum(values**2, axis=0)

    def take(self, other: Spread) -> None:
        """Add what another one has seen."""
        self.counts += other.counts
        self.sums += other.sums

    def summary(self) -> list[dict[str, Any]]:
        """Per layer: number of values, mean, standard deviation, quantiles."""
        found = []
        for counts, (total, squares) in zip(self.counts, self.sums.T.tolist()):
            n = int(counts.sum())
            if not n:
                found.append({"values": 0, "mean": None, "std": None} | dict.fromkeys(QUANTILES))
                continue
            below = np.cumsum(counts)
            places = np.searchsorted(below, np.array(list(QUANTILES.values())) * n)
            mean = total / n
            moments = {"values": n, "mean": mean, "std": max(0.0, squares / n - mean**2) ** 0.5}
            found.append(moments | dict(zip(QUANTILES, ((places + 0.5) / BINS).tolist())))
        return found


@dataclass
class Source:
    """What was found in one dataset; the arrays are of its rows."""

    name: str
    rows: int
    columns: dict[str, npt.NDArray[Any]]
    """[rows] tokens and answer_tokens (-1: not known), truncated, and the scores that there are."""
    gate: Spread | None
    entropy: Spread | None
    """Of routing probabilities of a row, as a share of ln E."""
    usage: Floats
    """[L, E] sum of routing probabilities over rows."""
    routed: npt.NDArray[np.int64]
    """[L] rows in that sum."""
    plan: dict[str, Any] | None


@dataclass
class Findings:
    """What was found in all of them."""

    sources: list[Source]
    shapes: dict[str, tuple[int, ...]]
    """Tensor -> its shape for one row."""
    units: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `units.jsonl`."""

    @property
    def gate(self) -> str | None:
        """The tensor whose values are shown as the gates'."""
        return next((name for name in GATES if name in self.shapes), None)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of all rows."""
        return np.concatenate([source.columns[name] for source in self.sources])

    @property
    def scores(self) -> list[str]:
        """The scores that some row has."""
        return [name for name in SINGLE if any(np.isfinite(s.columns[name]).any() for s in self.sources)]


def read(outputs: Sequence[Path]) -> Findings:
    """Read outputs, dataset by dataset.

    Args:
        outputs: as `selectmoe.router_data.locate` returns them, shards too.

    Raises:
        UserError: one is there twice, they are of different judges, or they hold no row.
    """
    groups = _groups(outputs)
    parts = [part for group, _ in groups.values() for part in group]
    if not parts:
        raise UserError("there is no router data: no row was routed")
    shapes = {part.path: part.shapes for part in parts}
    if different := [path for path in shapes if shapes[path] != parts[0].shapes]:
        raise UserError(
            f"{different[0]} and {parts[0].path} are of different judges: {shapes[different[0]]} and {parts[0].shapes}"
        )
    sources = [_source(name, *groups[name]) for name in progress(sorted(groups), desc="inspect", unit="datasets")]
    units = [json.loads(line) for output in outputs for line in _lines(output / UNITS)]
    return Findings(sources, parts[0].shapes, units)


def _groups(outputs: Sequence[Path]) -> dict[str, tuple[list[Part], dict[str, Any] | None]]:
    """Dataset -> its files, of one output or of several shards, and its plan."""
    groups: dict[str, tuple[list[Part], dict[str, Any] | None]] = {}
    seen: set[str] = set()
    for output in outputs:
        legacy = [LegacyPart.open(file) for file in files_of(output)]
        for part in legacy:
            if part.dataset in groups:
                raise UserError(f"{part.path}: dataset {part.dataset!r} is there twice")
            groups[part.dataset] = ([part], None)
        for name, folder in {} if legacy else rd.dataset_folders(output).items():
            identity = read_manifest(folder, verify=False).identity
            if identity in seen or isinstance(groups.get(name, ([None],))[0][0], LegacyPart):
                raise UserError(f"{folder}: dataset {name!r} is there twice")
            seen.add(identity)
            plan = json.loads((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).is_file() else None
            groups.setdefault(name, ([], plan))[0].extend(rd.parts_of(folder))
    return groups


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _source(name: str, parts: Sequence[Part], plan: dict[str, Any] | None) -> Source:
    shapes = parts[0].shapes
    layers, experts = shapes.get("router_probs", (0, 0))
    gate = next((g for g in GATES if g in shapes), None)
    found = Source(
        name=name,
        rows=sum(part.rows for part in parts),
        columns={},
        gate=Spread(shapes[gate][0]) if gate else None,
        entropy=Spread(layers) if layers else None,
        usage=np.zeros((layers, experts)),
        routed=np.zeros(layers, np.int64),
        plan=plan,
    )
    pieces: list[dict[str, npt.NDArray[Any]]] = []
    for part in parts:
        index = part.index()
        for rows in _chunks(part):
            data = _piece(part, index, rows)
            pieces.append(_columns(data))
            if found.gate is not None and gate:
                values = getattr(data, gate).astype(np.float64)
                found.gate.add(1 / (1 + np.exp(-values)) if gate == "quality_score" else values)
            if layers:
                _route(found, data.router_probs)
    found.columns = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    return found


def _chunks(part: Part) -> Iterator[slice]:
    row = 4 * max(1, *(int(np.prod(shape)) for shape in part.shapes.values())) if part.shapes else 4
    step = max(1, CHUNK_BYTES // row)
    for start in range(0, part.rows, step):
        yield slice(start, min(part.rows, start + step))


def _piece(part: Part, index: Mapping[str, Any], rows: slice) -> RouterData:
    n = rows.stop - rows.start
    columns: dict[str, Any] = {name: column[rows] for name, column in index.items()}
    for name, dimensions in rd.TENSORS.items():
        there = name in part.shapes and name != "embedding"
        absent = np.zeros((n,) + (0,) * dimensions, np.float32)
        columns[name] = part.tensor(name, rows.start, rows.stop) if there else absent
    return RouterData(**columns)


def _columns(data: RouterData) -> dict[str, npt.NDArray[Any]]:
    scores = {name: values.astype(np.float32) for name, values in table(data, SINGLE).items()}
    lengths = {name: getattr(data, name).astype(np.int32) for name in ("tokens", "answer_tokens")}
    return {**lengths, "truncated": data.truncated, **scores}


def _route(found: Source, probs: npt.NDArray[np.float32]) -> None:
    """Take the routing probabilities of some rows, [n, L, E]."""
    there = np.logical_and(np.isfinite(probs).all(axis=-1), (probs > 0).any(axis=-1))
    found.routed += there.sum(axis=0)
    kept = np.where(there[..., None], probs, 0)
    found.usage += kept.sum(axis=0, dtype=np.float64)
    logs = np.log(kept, out=np.zeros_like(kept), where=kept > 0)
    entropy = -np.einsum("nle,nle->nl", kept, logs).astype(np.float64) / np.log(max(2, probs.shape[-1]))
    assert found.entropy is not None
    found.entropy.add(np.where(there, entropy, np.nan))


def numbers(found: Findings) -> dict[str, Any]:
    """Everything that is shown, as it stands in `inspect.json`; None where there is none."""
    rows = sum(source.rows for source in found.sources)
    layers, experts = found.shapes.get("router_probs", (0, 0))
    return {
        "rows": rows,
        "layers": layers or None,
        "experts": experts or None,
        "embedding": found.shapes["embedding"][0] if "embedding" in found.shapes else None,
        "gate": {"tensor": found.gate, "layers": _together([s.gate for s in found.sources])} if found.gate else None,
        "entropy": _entropy(found) if layers else None,
        "use": use(found) if layers else None,
        "sources": {source.name: _one(source, found.scores) for source in found.sources},
        "scores": {name: _quantiles(found.column(name)) for name in found.scores},
        "agreement": agreement(found),
        "work": work(found),
    }


def _together(spreads: Sequence[Spread | None]) -> list[dict[str, Any]]:
    every = [spread for spread in spreads if spread is not None]
    total = Spread(len(every[0].counts))
    for spread in every:
        total.take(spread)
    return total.summary()


def _entropy(found: Findings) -> list[dict[str, Any]]:
    """Per layer: of single rows, and of the mean over all rows."""
    shares = mean_use(found)
    of_mean = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1) / np.log(max(2, shares.shape[1]))
    layers = _together([source.entropy for source in found.sources])
    return [layer | {"of_mean": value} for layer, value in zip(layers, of_mean.tolist())]


def mean_use(found: Findings) -> Floats:
    """[L, E] mean routing probability over all rows."""
    usage: Floats = np.sum([source.usage for source in found.sources], axis=0)
    routed = np.sum([source.routed for source in found.sources], axis=0)
    shares: Floats = usage / np.maximum(1, routed)[:, None]
    return shares


def use(found: Findings) -> dict[str, Any]:
    """Mean probability of every expert; dead and rare ones as [layer, expert]."""
    shares = mean_use(found)
    relative = shares * shares.shape[1]
    return {
        "mean": shares.tolist(),
        "dead": np.argwhere(relative < DEAD).tolist(),
        "rare": np.argwhere((relative >= DEAD) & (relative < RARE)).tolist(),
        "dead_below": DEAD / shares.shape[1],
        "rare_below": RARE / shares.shape[1],
    }


def _one(source: Source, scores: Sequence[str]) -> dict[str, Any]:
    tokens, answers = source.columns["tokens"], source.columns["answer_tokens"]
    known = bool((tokens >= 0).all())
    return {
        "rows": source.rows,
        "tokens": _quantiles(tokens) if known else None,
        "answer_tokens": _quantiles(answers) if known else None,
        "without_answer": int((answers == 0).sum()) if known else None,
        "truncated": float(source.columns["truncated"].mean()) if known else None,
        "scores": {name: _quantiles(source.columns[name]) for name in scores},
        "gate": source.gate.summary() if source.gate else None,
        "entropy": source.entropy.summary() if source.entropy else None,
        "padding": padding(source.plan) if source.plan else None,
    }


def _quantiles(values: npt.NDArray[Any]) -> dict[str, Any]:
    there = values[np.isfinite(values)].astype(np.float64)
    if not len(there):
        return {"values": 0, "mean": None} | dict.fromkeys(QUANTILES)
    found = np.quantile(there, list(QUANTILES.values()))
    return {"values": len(there), "mean": float(there.mean())} | dict(zip(QUANTILES, found.tolist()))


def agreement(found: Findings) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation of every two scores and the rows' length, over the rows that have both."""
    columns: dict[str, Floats] = {name: found.column(name).astype(np.float64) for name in found.scores}
    tokens = found.column("tokens").astype(np.float64)
    if (tokens >= 0).all():
        columns["length"] = tokens
    return {a: {b: _spearman(columns[a], columns[b]) for b in columns} for a in columns}


def _spearman(a: Floats, b: Floats) -> float | None:
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None
    return float(np.corrcoef(mean_ranks(a[both]), mean_ranks(b[both]))[0, 1])


def padding(plan: Mapping[str, Any]) -> float | None:
    """Padding of a plan, as a share of the tokens that are read."""
    return plan["padded_tokens"] / plan["tokens"] - 1 if plan["tokens"] else None


def work(found: Findings) -> dict[str, Any]:
    """Padding of all plans, and the slowest pieces of work where they are known."""
    plans = [source.plan for source in found.sources if source.plan]
    totals = {key: sum(plan[key] for plan in plans) for key in ("batches", "tokens", "padded_tokens")}
    seconds = sum(unit["seconds"] for unit in found.units)
    computed = sum(unit["padded_tokens"] for unit in found.units)
    slowest = sorted(found.units, key=lambda unit: (-unit["seconds"], unit["dataset"], unit["batches"]))[:SLOWEST]
    return {
        "plan": totals | {"padding": padding(totals)} if plans else None,
        "units": len(found.units),
        "seconds": seconds,
        "padded_tokens_per_second": computed / seconds if seconds else None,
        "slowest": slowest,
    }
