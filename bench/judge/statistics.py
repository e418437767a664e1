"""How well scores tell good rows from bad ones, with intervals by a bootstrap over rows and seeds.

No command runs this module. Clean rows and the planted rows of every kind are resampled apart, the same draws for every score:
differences are paired. The mean over kinds is the one number per score. Over few seeds such intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DIGITS = 4
"""Of numbers that are written down."""


@dataclass(frozen=True)
class Draws:
    """Resampled rows: how often each row is drawn in every replicate; the first replicate is the sample itself.

    Attributes:
        good: positions of the clean rows.
        bad: positions of the planted rows, by kind.
        good_counts: [1 + replicates, clean rows].
        bad_counts: [1 + replicates, planted rows], by kind.
        seed: of the draws; those of judges' seeds follow from it.
    """

    good: npt.NDArray[np.int64]
    bad: dict[str, npt.NDArray[np.int64]]
    good_counts: Floats
    bad_counts: dict[str, Floats]
    seed: int

    @property
    def replicates(self) -> int:
        """Number of replicates, the sample itself left out."""
        return len(self.good_counts) - 1


def draw(kinds: Sequence[str], replicates: int, seed: int = 0) -> Draws:
    """Draw replicates.

    Args:
        kinds: of every row: the kind of its corruption, "" for a clean row.
        replicates: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    all_kinds = np.asarray(kinds)
    rows = {kind: np.flatnonzero(all_kinds == kind) for kind in dict.fromkeys(["", *sorted(set(kinds))])}

    def counts(n: int) -> Floats:
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=replicates).astype(np.float64)
        return np.concatenate([np.ones((1, n)), drawn])

    drawn = {kind: counts(len(at)) for kind, at in rows.items()}
    bad = [kind for kind in rows if kind]
    return Draws(rows[""], {k: rows[k] for k in bad}, drawn[""], {k: drawn[k] for k in bad}, seed)


def aucs(values: npt.ArrayLike, draws: Draws, kinds: Sequence[str] | None = None) -> dict[str, Floats]:
    """AUC of a score for every kind and replicate: [1 + replicates] each.

    Args:
        values: [rows], higher is better; a row without a score (NaN) is below every other one.
        draws: the replicates.
        kinds: only these.
    """
    score = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=-np.inf)
    out = {}
    for kind in kinds if kinds is not None else draws.bad:
        good, bad = score[draws.good][:, None], score[draws.bad[kind]][None]
        above = (good > bad) + 0.5 * (good == bad)
        counts = draws.bad_counts[kind]
        wins = ((draws.good_counts @ above) * counts).sum(axis=1)
        out[kind] = wins / (draws.good_counts.sum(axis=1) * counts.sum(axis=1))
    return out


def macro(by_kind: Mapping[str, Floats]) -> Floats:
    """The mean over kinds, per replicate."""
    mean: Floats = np.mean(list(by_kind.values()), axis=0)
    return mean


def over_seeds(by_seed: Sequence[Floats], seed: int = 0) -> Floats:
    """The mean over seeds, which are resampled too: [1 + replicates]; the first is the plain mean."""
    stacked = np.stack(by_seed)
    rng = np.random.default_rng([seed, len(stacked)])
    chosen = rng.integers(len(stacked), size=(stacked.shape[1], len(stacked)))
    chosen[0] = np.arange(len(stacked))
    mean: Floats = stacked[chosen, np.arange(stacked.shape[1])[:, None]].mean(axis=1)
    return mean


def summary(replicates: Floats) -> dict[str, Any]:
    """Estimate and 95 % percentile interval."""
    low, high = np.quantile(replicates[1:], [0.025, 0.975])
    return {"value": float(replicates[0]), "low": float(low), "high": float(high)}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent values with its 95 % t interval, and how far single ones scatter."""
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    mean = float(x.mean())
    return {
        "value": mean,
        "low": mean - half,
        "high": mean + half,
        "smallest": float(x.min()),
        "largest": float(x.max()),
        "n": len(x),
    }


def pseudo_planted(
    values: npt.ArrayLike, good: npt.NDArray[np.int64], share: float, times: int, seed: int = 0
) -> Floats:
    """AUC on rows none of which is planted, a share of them called bad at random, `times` times."""
    rng = np.random.default_rng(seed)
    score = np.asarray(values, dtype=np.float64)[good]
    out = np.zeros(times)
    for n in range(times):
        order = rng.permutation(len(score))
        bad, rest = np.split(order, [max(1, round(share * len(order)))])
        difference = score[rest][:, None] - score[bad][None]
        out[n] = ((difference > 0) + 0.5 * (difference == 0)).mean()
    return out


def rounded(value: Any) -> Any:
    """The same with floats of few digits, so that the file is small."""
    if isinstance(value, float):
        return round(value, DIGITS) if abs(value) > 10**-DIGITS else value
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
