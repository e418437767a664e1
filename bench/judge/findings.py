"""From finished cells to numbers: AUCs with intervals, differences to perplexity and to the best untrained gate, controls.

No command runs this module. `Evaluation` compares scores on one set of rows; `findings` puts everything into one dictionary,
`results.json`, from which the page is written and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.judge import applied, statistics
from bench.judge.design import BIASES, UNTRAINED, WARM, Cell, Design, applied_cells, observer_cells, untrained_cells
from bench.judge.gates import ARRAYS
from bench.judge.study import Study, transferred
from selectmoe.progress import progress
from selectmoe.router_data import RouterData
from selectmoe.scores import mean_ranks, score

GATE_SCORES = ("answer", "all", "legacy", "combined")
CHOSEN_FROM = ("answer", "all", "legacy")
"""Scores that a gate alone makes; `combined` has perplexity in it."""
ENTROPY = "router_entropy"
"""A rival on the judge as it was; a score too where gates are applied, which changes what its routers read."""
RIVALS = ("nll", "ifd", "nll_ifd", "length", ENTROPY)

Floats = npt.NDArray[np.float64]
Arrays = Mapping[str, npt.NDArray[Any]]


def rival_scores(data: RouterData) -> dict[str, Floats]:
    """What needs no gate; `nll_ifd` is the smaller of their ranks, `length` counts tokens, few routes are called good."""
    nll, ifd = score(data, "nll"), score(data, "ifd")
    return {
        "nll": nll,
        "ifd": ifd,
        "nll_ifd": np.minimum(mean_ranks(np.nan_to_num(nll, nan=-np.inf)), mean_ranks(np.nan_to_num(ifd, nan=-np.inf))),
        "length": data.tokens.astype(np.float64),
        ENTROPY: decidedness(data.router_probs),
    }


def decidedness(router_probs: npt.NDArray[Any]) -> Floats:
    """Minus the entropy of the routing, mean over layers; [N, L, E] -> [N]."""
    probs = np.clip(router_probs.astype(np.float64), 1e-12, None)
    found: Floats = (probs * np.log(probs)).sum(axis=2).mean(axis=1)
    return found


def raw_score(arrays: Arrays) -> Floats:
    """Mean over layers of the mean raw score over all tokens."""
    mean: Floats = arrays["quality_score"].astype(np.float64).mean(axis=1)
    return mean


class Evaluation:
    """Scores of one set of rows, compared with the same resampled rows.

    Args:
        data: router data of the rows, with the rivals' numbers.
        kinds: of every row, "" for a clean one.
        replicates: of the bootstrap.
    """

    def __init__(self, data: RouterData, kinds: Sequence[str], replicates: int) -> None:
        self.data, self.kinds = data, list(kinds)
        self.draws = statistics.draw(kinds, replicates)
        self.rivals = {name: statistics.aucs(values, self.draws) for name, values in rival_scores(data).items()}
        self.best: dict[str, Floats] = {}

    def value(self, arrays: Arrays, name: str) -> Floats:
        """A gate's score of every row, or that of the routers beside it."""
        if name == ENTROPY:
            return decidedness(arrays["router_probs"])
        pooled: dict[str, Any] = {key: arrays[key] for key in ARRAYS}
        return score(dataclasses.replace(self.data, **pooled), name)

    def set_untrained(self, judges: Sequence[Arrays]) -> None:
        """Remember, per score, the untrained gates that happen to rank best."""
        for name in GATE_SCORES:
            tried = [statistics.macro(statistics.aucs(self.value(a, name), self.draws)) for a in judges]
            self.best[name] = max(
                [*tried, *([self.best[name]] if name in self.best else [])], key=lambda x: float(x[0])
            )

    def group(self, cells: Sequence[Cell], result: Callable[[Cell], Arrays]) -> dict[str, Any]:
        """All scores of one configuration, over its seeds; a left-out kind is judged by the gates that had not seen it."""
        names = [*GATE_SCORES, *([ENTROPY] if "router_probs" in result(cells[0]) else [])]
        by_score: dict[str, dict[int, dict[str, Floats]]] = {name: {} for name in names}
        in_sample = []
        for cell in cells:
            arrays = result(cell)
            in_sample += [float(arrays["in_sample"])] if "in_sample" in arrays else []
            for name in names:
                found = statistics.aucs(self.value(arrays, name), self.draws, cell.left_out or None)
                by_score[name].setdefault(cell.seed, {}).update(found)
        out: dict[str, Any] = {"cell": dataclasses.asdict(cells[0].group), "seeds": len(by_score["answer"])}
        out["in_sample"] = float(np.mean(in_sample)) if in_sample else None
        out["scores"] = {name: self._compare(name, list(seeds.values())) for name, seeds in by_score.items()}
        return out

    def _compare(self, name: str, seeds: Sequence[Mapping[str, Floats]]) -> dict[str, Any]:
        total = statistics.over_seeds([statistics.macro(kinds) for kinds in seeds])
        out: dict[str, Any] = {
            "macro": statistics.summary(total),
            "minus_nll": statistics.summary(total - statistics.macro(self.rivals["nll"])),
            "kinds": {k: statistics.summary(statistics.over_seeds([s[k] for s in seeds])) for k in seeds[0]},
        }
        if name in self.best:
            out["minus_untrained"] = statistics.summary(total - self.best[name])
        return out

    def rival_table(self) -> dict[str, Any]:
        """The rivals, as in `group`."""
        nll = statistics.macro(self.rivals["nll"])
        return {
            name: {
                "macro": statistics.summary(statistics.macro(kinds)),
                "minus_nll": statistics.summary(statistics.macro(kinds) - nll),
                "kinds": {kind: statistics.summary(values) for kind, values in kinds.items()},
            }
            for name, kinds in self.rivals.items()
        }


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each configuration together, in the order of the first ones."""
    out: dict[Cell, list[Cell]] = {}
    for cell in cells:
        out.setdefault(cell.group, []).append(cell)
    return list(out.values())


def is_main(d: Design, cell: Cell) -> bool:
    """Whether a cell belongs to the grid that the choice is made from."""
    plain = cell.loss != UNTRAINED and not (cell.unseen or cell.permuted or cell.weight != 1)
    rows, rate = (d.warm, d.rate) if cell.mode == "observer" else (d.applied_rows, d.applied_rate)
    return plain and cell.rows == rows and cell.rate == rate and (cell.loss != "contrastive" or bool(cell.left_out))


def choose(groups: Sequence[Mapping[str, Any]], d: Design) -> dict[str, Any]:
    """The rule, fixed before anything ran: the mode, loss, bias and gate's score with the largest mean AUC minus that of nll.

    The mean is over the kinds of warm-up (clean, contaminated) that were run; rows, rate and weight are not chosen here.
    """
    ranks: dict[tuple[str, str, float, str], list[float]] = {}
    for group in groups:
        cell = as_cell(group)
        if is_main(d, cell):
            for name in CHOSEN_FROM:
                key = (cell.mode, cell.loss, cell.bias, name)
                ranks.setdefault(key, []).append(group["scores"][name]["minus_nll"]["value"])
    means = {key: float(np.mean(values)) for key, values in ranks.items()}
    order = sorted(means, key=lambda key: (-means[key], key))
    cell = next(as_cell(g) for g in groups if is_main(d, as_cell(g)) and same_key(as_cell(g), order[0]))
    runners = [{"mode": k[0], "loss": k[1], "bias": k[2], "score": k[3], "minus_nll": means[k]} for k in order]
    return {"cell": dataclasses.asdict(cell), "score": order[0][3], "order": runners}


def best_observer(chosen: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], d: Design) -> Cell:
    """The observer that stands first in the order of `choose`."""
    key = next((o["mode"], o["loss"], o["bias"], o["score"]) for o in chosen["order"] if o["mode"] == "observer")
    return next(as_cell(g) for g in groups if is_main(d, as_cell(g)) and same_key(as_cell(g), key))


def same_key(cell: Cell, key: tuple[str, str, float, str]) -> bool:
    """Whether a cell has the mode, loss and bias of a key of `choose`."""
    return (cell.mode, cell.loss, cell.bias) == key[:3]


def as_cell(group: Mapping[str, Any]) -> Cell:
    """The configuration of a group as a cell."""
    return Cell(**{**group["cell"], "left_out": tuple(group["cell"]["left_out"])})


class Findings:
    """The numbers of a study, whose cells are finished."""

    def __init__(self, study: Study) -> None:
        self.study, self.d = study, study.d
        self.whole = {name: self._evaluation(name, None) for name in study.pools}
        self.part = {name: self._evaluation(name, applied.subset(self.d, study.pools[name])) for name in study.pools}

    def _evaluation(self, pool: str, rows: Sequence[Any] | None) -> Evaluation:
        data, kinds = self.study.routed(pool), self.study.pools[pool].kinds
        if rows is not None:
            wanted = {row.key for row in rows}
            data = data.take([n for n, key in enumerate(data.keys) if key in wanted])
        found = Evaluation(data, [kinds.get(key, "") for key in data.keys], self.d.replicates)
        untrained = [self.result(cell) for cell in untrained_cells(self.d, pool)]
        if rows is not None:
            at = [n for n, key in enumerate(self.study.routed(pool).keys) if key in wanted]
            untrained = [{name: a[name][at] for name in ARRAYS} for a in untrained]
            through = [c for c in applied_cells(self.d) if c.loss == UNTRAINED and c.pool == pool]
            untrained += [self.result(cell) for cell in through]
        found.set_untrained(untrained)
        return found

    def sets(self) -> dict[str, dict[str, Evaluation]]:
        """The rows that observers score, and the part of them that applied gates score."""
        return {"all rows": self.whole, "rows of applied gates": self.part}

    def result(self, cell: Cell) -> Arrays:
        """A finished cell."""
        found = self.study.result(cell.name)
        assert found is not None, f"{cell.name} is not finished"
        return found

    def groups(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Every configuration of some cells."""
        out = []
        for group in progress(grouped(cells), "comparing", unit="configuration"):
            where = self.whole if group[0].mode == "observer" else self.part
            out.append(where[group[0].pool].group(group, self.result))
        return out

    def pool_a(self) -> list[dict[str, Any]]:
        """Every configuration of pool A, untrained gates first."""
        cells = [*untrained_cells(self.d, "A"), *observer_cells(self.d), *applied_cells(self.d)]
        return self.groups([c for c in cells if not (c.unseen or c.permuted)])

    def untrained(self, pool: str) -> dict[str, Any]:
        """Per bias and score: mean over initialisations with its interval, and how far single ones scatter."""
        out: dict[str, Any] = {}
        for bias in BIASES:
            judges = [self.result(c) for c in untrained_cells(self.d, pool) if c.bias == bias]
            for name in ("answer", "all", "legacy", "raw"):
                values = [self._macro(pool, judge, name) for judge in judges]
                out[f"bias {bias:g}, {name}"] = {**statistics.mean_interval(values), "values": values}
        return out

    def _macro(self, pool: str, arrays: Arrays, name: str) -> float:
        where = self.whole[pool]
        values = raw_score(arrays) if name == "raw" else where.value(arrays, name)
        point = dataclasses.replace(
            where.draws,
            good_counts=where.draws.good_counts[:1],
            bad_counts={kind: counts[:1] for kind, counts in where.draws.bad_counts.items()},
        )
        return float(statistics.macro(statistics.aucs(values, point))[0])

    def controls(self) -> dict[str, Any]:
        """What must be a coin, or sum to one."""
        judges = [self.result(c) for c in untrained_cells(self.d, "A")]
        sums = []
        for arrays in judges:
            negated = {name: arrays[f"negated/{name}"] for name in ARRAYS}
            sums.append(self._macro("A", arrays, "raw") + self._macro("A", negated, "raw"))
        permuted = [self.result(c) for c in observer_cells(self.d) if c.permuted]
        trained = next(
            g for g in grouped(observer_cells(self.d)) if is_main(self.d, g[0]) and g[0].loss == "contrastive"
        )
        good = self.whole["A"].draws.good
        values = [self.whole["A"].value(self.result(cell), "answer") for cell in trained]
        pseudo = np.stack([statistics.pseudo_planted(v, good, 0.5, 200, n) for n, v in enumerate(values)])
        shuffled = [np.random.default_rng(n).permutation(v) for n, v in enumerate(values)]
        return {
            "untrained": {name: self.untrained(name) for name in self.study.pools},
            "sum_with_negated": {"smallest": min(sums), "largest": max(sums), "n": len(sums)},
            "permuted_in_training": {
                name: {**statistics.mean_interval(v), "values": v}
                for name in ("answer", "all")
                for v in [[self._macro("A", arrays, name) for arrays in permuted]]
            },
            "permuted_in_scoring": statistics.mean_interval(
                [float(statistics.macro(statistics.aucs(v, self.whole["A"].draws))[0]) for v in shuffled]
            ),
            "nothing_planted": {
                "value": float(pseudo.mean()),
                "low": float(np.quantile(pseudo, 0.025)),
                "high": float(np.quantile(pseudo, 0.975)),
                "n": int(pseudo.size),
            },
            "shortcut_error": {name: self.study.shortcut_error(name) for name in self.study.pools},
        }

    def unseen(self) -> list[dict[str, Any]]:
        """Rows of one source, by gates that saw it in warm-up (not the kind) and by gates that did not."""
        out = []
        cells = observer_cells(self.d)
        seen = [
            c for c in cells if is_main(self.d, c) and c.loss == "contrastive" and c.bias == 0 and c.warm == "clean"
        ]
        for source in self.d.names("A"):
            data = self.study.routed("A")
            at = [n for n, name in enumerate(data.dataset) if name == source]
            kinds = [self.whole["A"].kinds[n] for n in at]
            if "" not in kinds or len(set(kinds)) < 2:
                continue
            part = Evaluation(data.take(at), kinds, self.d.replicates)
            here = set(kinds) - {""}

            def rows(cell: Cell, at: list[int] = at) -> Arrays:
                return {name: self.result(cell)[name][at] for name in ARRAYS}

            row: dict[str, Any] = {"source": source, "clean": kinds.count(""), "planted": len(kinds) - kinds.count("")}
            row["nll"] = statistics.summary(statistics.macro(part.rivals["nll"]))
            for name, chosen in (("seen", seen), ("unseen", [c for c in cells if c.unseen == source])):
                of = [c for c in chosen if c.seed < self.d.few_seeds and set(c.left_out) <= here]
                row[name] = part.group(of, rows)["scores"]["answer"]["macro"]
            out.append(row)
        return out

    def layers(self, chosen: Cell) -> dict[str, Any]:
        """The best observers of pool A, scored by some of their layers only (the score `answer`)."""
        number = self.study.shape()[0]
        third = max(1, number // 3)
        parts = {f"{n}": [n] for n in range(number)}
        parts |= {"first third": [*range(third)], "middle third": [*range(third, 2 * third)]}
        parts |= {"last third": [*range(2 * third, number)], "all": [*range(number)]}
        cells = [
            c
            for c in observer_cells(self.d)
            if c.group == dataclasses.replace(chosen, warm="clean").group and c.seed < self.d.few_seeds
        ]
        out = {}
        for name, layers in parts.items():
            if not layers:  # a judge of two layers has no last third
                continue

            def only(cell: Cell, layers: list[int] = layers) -> Arrays:
                arrays = self.result(cell)
                return {key: arrays[key][:, layers] for key in ARRAYS}

            out[name] = self.whole["A"].group(cells, only)["scores"]["answer"]
        return out

    def confirmed(self, chosen: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
        """Pool B: the chosen configuration trained there, that of pool A brought there, the predecessor's recipe."""
        out: dict[str, Any] = {"groups": self.groups(cells)}
        cell = as_cell(chosen)
        if cell.mode == "observer":
            brought = [c for c in observer_cells(self.d) if c.group == dataclasses.replace(cell, warm="clean").group]

            def there(c: Cell) -> Arrays:
                found = self.study.result(transferred(c, "B"))
                assert found is not None
                return found

            out["brought"] = self.whole["B"].group(brought, there)
        return out


def brought_cells(d: Design, chosen: Cell) -> list[Cell]:
    """The observers of pool A that also score pool B."""
    if chosen.mode != "observer":
        return []
    return [c for c in observer_cells(d) if c.group == dataclasses.replace(chosen, warm=WARM[0]).group]
