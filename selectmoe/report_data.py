"""What the report is made of: the outputs of a run, found by their manifests, and the numbers that follow from them.

No command runs this module; `selectmoe report` does. Every number of the report is computed here and stands in
`results.json`; nothing is typed in.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.evaluate import HOLDOUT, read_results
from selectmoe.manifest import Manifest, find_manifests
from selectmoe.pool import Row, locate, read_pool
from selectmoe.router_data import RouterData, read_router_data
from selectmoe.scores import auc, table
from selectmoe.selection import DRAWN, Selected, read_selected
from selectmoe.stage import RUN
from selectmoe.verdict import ALPHA, Verdict, judge, metric_values

Key = tuple[str, str]
Floats = npt.NDArray[np.float64]
SHOWN_SCORES = ("answer", "all", "legacy", "nll", "ifd", "combined")
"""Scores whose ranking of planted rows is shown, beside the row's length."""
EXAMPLES = 5
"""Rows shown of the best and of the worst."""


@dataclass
class Findings:
    """Everything that was found."""

    outputs: list[tuple[Path, Manifest]]
    rows: dict[Key, Row]
    router: RouterData
    planted: dict[Key, str]
    warmed: set[Key]
    selections: dict[str, list[Selected]]
    """Folder (`ARM` or `ARM-SEED`) -> its rows."""
    arms: dict[str, str]
    """Folder -> arm."""
    clusters: dict[str, list[Any]]
    """Columns of the selected arm's clusters.parquet."""
    values: dict[str, Floats]
    """Arm -> [seeds, examples] bits."""
    weights: Floats
    strata: list[str]
    base: Floats | None
    """[examples] bits of the model without an adapter."""
    scores: dict[str, Floats] = field(default_factory=dict)


def by_stage(outputs: list[tuple[Path, Manifest]], stage: str) -> list[tuple[Path, Manifest]]:
    """The outputs of one stage."""
    return [(path, manifest) for path, manifest in outputs if manifest.stage == stage]


def the_one(outputs: list[tuple[Path, Manifest]], stage: str) -> Path:
    """The only output of a stage.

    Raises:
        UserError: there is none, or several.
    """
    found = by_stage(outputs, stage)
    if len({manifest.identity for _, manifest in found}) != 1:
        raise UserError(f"runs= hold {len(found)} outputs of stage {stage}; the report needs exactly one")
    return found[0][0]


def find(runs: list[str]) -> list[tuple[Path, Manifest]]:
    """The finished outputs at or below `runs`, each once, reports left out.

    Raises:
        UserError: there is none, or one of `runs` does not exist.
    """
    outputs: dict[Path, tuple[Path, Manifest]] = {}
    for run in runs:
        if not Path(run).is_dir():
            raise UserError(f"runs: {run} is no folder: name the output of a stage, or a folder that holds such")
        for path, manifest in find_manifests(run):
            if manifest.stage != "report":
                outputs.setdefault(path.resolve(), (path, manifest))
    if not outputs:
        raise UserError(f"runs={runs} hold no finished output of Select-MoE")
    return list(outputs.values())


def collect(outputs: list[tuple[Path, Manifest]]) -> Findings:
    """Read the outputs that `find` found.

    Raises:
        UserError: an output that the report needs is missing or does not fit the others.
    """
    ingested = [(p, m) for p, m in by_stage(outputs, "ingest") if (p / "pool").is_dir() and not m.parts]
    ingest = the_one(ingested, "ingest")
    warmup = the_one(outputs, "warmup")
    rows = {row.key: row for row in read_pool(locate(ingest))}
    router = read_router_data(the_one(outputs, "route"))
    selections: dict[str, list[Selected]] = {}
    chosen: Path | None = None
    identities: dict[str, str] = {}
    arms: dict[str, str] = {}
    for path, manifest in by_stage(outputs, "select"):
        name = path.name if (path.parent / "arms.json").is_file() else "selected"
        if name in selections and manifest.identity != identities[name]:
            raise UserError(f"runs= hold two different selections for {name}: name the outputs of one run only")
        identities[name] = manifest.identity
        selections[name] = read_selected(path)
        made = manifest.config["identity"]
        arms[name] = name.removesuffix(f"-{made['seed']}") if made["method"] in DRAWN else name
        chosen = path if name == "selected" else chosen
    if chosen is None:
        raise UserError("runs= hold no output of `select` for the arm selected")
    values, weights, strata, base = evaluations(outputs)
    planted = ingest / "planted.jsonl"
    found = Findings(
        outputs=outputs,
        rows=rows,
        router=router,
        planted={(r["dataset"], r["id"]): r["kind"] for r in (_lines(planted) if planted.is_file() else [])},
        warmed={(r["dataset"], r["id"]) for r in _lines(warmup / "warmup_rows.jsonl")},
        selections=selections,
        arms=arms,
        clusters=_columns(chosen / "clusters.parquet"),
        values=values,
        weights=weights,
        strata=strata,
        base=base,
    )
    found.scores = table(router, SHOWN_SCORES)
    found.scores["length"] = router.tokens.astype(np.float64)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: without it, rows that were trained on cannot be told from the others")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return columns


def evaluations(
    outputs: list[tuple[Path, Manifest]],
) -> tuple[dict[str, Floats], Floats, list[str], Floats | None]:
    """Held-out bits: arm -> [seeds, n], bytes [n], source of each example [n], and the base model's bits [n].

    Raises:
        UserError: evaluations are missing, or were not made on the same examples.
    """
    bits: dict[tuple[str, int], Floats] = {}
    identities: dict[tuple[str, int], str] = {}
    examples: list[tuple[str, str, float]] = []
    for path, manifest in by_stage(outputs, "evaluate"):
        results = [r for r in read_results(path) if r.task == HOLDOUT]
        mine = [(r.dataset, r.id, r.weight) for r in results]
        if examples and mine != examples:
            raise UserError(f"{path} was evaluated on other examples than the other runs: evaluate all on one holdout")
        examples = mine
        config = manifest.config["identity"]
        arm, seed = config["arm"], int(config["seed"])
        if (arm, seed) in bits and manifest.identity != identities[arm, seed]:
            raise UserError(
                f"runs= hold two different evaluations of {arm}, seed {seed}: name the outputs of one run only"
            )
        identities[arm, seed] = manifest.identity
        bits[arm, seed] = np.array([r.value for r in results])
    if not examples:
        raise UserError("runs= hold no evaluation on held-out rows: run `selectmoe evaluate holdout=...` for every arm")
    arms = sorted({arm for arm, _ in bits if arm != "base"})
    seeds = {arm: sorted(seed for name, seed in bits if name == arm) for arm in arms}
    short = [arm for arm in arms if seeds[arm] != seeds[arms[0]]]
    if short:
        raise UserError(
            f"arm {short[0]} has seeds {seeds[short[0]]}, {arms[0]} has {seeds[arms[0]]}: evaluate the rest"
        )
    values = {arm: np.stack([bits[arm, seed] for seed in seeds[arm]]) for arm in arms}
    base = next((value for (arm, _), value in bits.items() if arm == "base"), None)
    return values, np.array([w for _, _, w in examples]), [d for d, _, _ in examples], base


def seeds(found: Findings) -> list[int]:
    """The training seeds, the same for every arm, in the order of `Findings.values`."""
    configs = [m.config["identity"] for _, m in by_stage(found.outputs, "evaluate")]
    return sorted({int(config["seed"]) for config in configs if config["arm"] != "base"})


def verdict(found: Findings, metric: str) -> Verdict:
    """The verdict (`selectmoe.verdict`)."""
    return judge(found.values, found.weights, found.strata, metric=metric)


def metrics(found: Findings) -> dict[str, list[float]]:
    """Arm -> bits per byte per seed, macro over sources; `base` too."""
    strata = np.array(found.strata)
    everything = dict(found.values) | ({} if found.base is None else {"base": found.base[None]})
    return {arm: [float(v) for v in metric_values(bits, found.weights, strata)] for arm, bits in everything.items()}


def summary(bits: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Arm -> mean over seeds and the ends of its 95 % t interval over seeds (no interval with one seed)."""
    from scipy import stats

    out: dict[str, dict[str, float]] = {}
    for arm, values in bits.items():
        out[arm] = {"mean": float(np.mean(values))}
        if len(values) > 1:
            error = float(np.std(values, ddof=1)) / len(values) ** 0.5
            half = float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * error
            out[arm] |= {"low": out[arm]["mean"] - half, "high": out[arm]["mean"] + half}
    return out


def examples(found: Findings) -> dict[str, list[dict[str, Any]]]:
    """The rows with the highest and the lowest gate scores, without their text."""
    scores, keys = found.scores["answer"], found.router.keys
    order = [int(i) for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])]
    parts = {"best": order[:EXAMPLES], "worst": order[::-1][:EXAMPLES]}
    return {
        name: [
            {"dataset": keys[i][0], "id": keys[i][1], "score": float(scores[i]), "kind": found.planted.get(keys[i], "")}
            for i in places
        ]
        for name, places in parts.items()
    }


def aucs(found: Findings) -> dict[str, dict[str, dict[str, float]]]:
    """How each score ranks planted rows below the others: {held_out | in_sample: {kind: {score: AUC}}}.

    `held_out` leaves out the rows of the warm-up; a kind without rows is left out.
    """
    kinds = np.array([found.planted.get(key, "") for key in found.router.keys])
    seen = np.array([key in found.warmed for key in found.router.keys])
    result: dict[str, dict[str, dict[str, float]]] = {}
    for part, mask in (("held_out", ~seen), ("in_sample", seen)):
        for kind in ["any", *sorted(set(kinds) - {""})]:
            bad = mask & ((kinds != "") if kind == "any" else (kinds == kind))
            good = mask & (kinds == "")
            for name, values in found.scores.items():
                clean, planted = (values[m & np.isfinite(values)] for m in (good, bad))
                if len(clean) and len(planted):
                    result.setdefault(part, {}).setdefault(str(kind), {})[name] = float(auc(clean, planted))
    return result


def stages(found: Findings) -> list[dict[str, Any]]:
    """Time, rows, bytes, files with their digests, and the command per output."""
    parts = ("pool", "holdout")
    return [
        {
            "stage": m.stage,
            "arm": m.config["identity"].get("arm", path.name if m.stage == "select" or path.name in parts else ""),
            "seed": m.config["identity"].get("seed", ""),
            "seconds": m.environment["seconds"],
            "peak_rss_mib": round(m.environment["peak_rss_bytes"] / 2**20),
            "rows_in": m.rows["in"],
            "rows_out": m.rows["out"],
            "dropped": "; ".join(f"{n} {reason}" for reason, n in m.rows["dropped"].items()),
            "bytes": sum(f["bytes"] for f in m.files),
            "identity": m.identity,
            "inputs": " ".join(f"{name}={entry['identity'][:12]}" for name, entry in sorted(m.inputs.items())),
            "files": [[f["path"], f["bytes"], f["sha256"]] for f in m.files],
            "command": command(m),
        }
        for path, m in found.outputs
    ]


def command(manifest: Manifest) -> str:
    """The command that does this again; what `merge` and `baseline` write as a part is made by them."""
    from selectmoe.config import flatten

    def word(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ",".join(map(word, value)) + "]"
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    own = flatten(manifest.config["identity"]) | flatten(manifest.config["execution"])
    given = dict(manifest.config.get(RUN, own))
    stage = "merge" if manifest.stage == "route" and "shards" in given else manifest.stage
    given["output_dir"] = str(given["output_dir"]).replace("/.work/staging", "")  # where a part was while it was made
    words = [
        shlex.quote(f"{k}={word(v)}") for k, v in given.items() if v not in ("", [], {}, None) and k != "work_root"
    ]
    return " ".join(["selectmoe", stage, *words])
