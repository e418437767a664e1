"""The score of a row: one definition per name, used everywhere, and how well a score tells good rows from bad.

No command runs this module; `selectmoe select score=NAME` picks one. Higher is better for all of them; NaN means that
the row has no such score. What the judge or the file does not hold (`available`) cannot be asked for: a judge without gates
gives no gate scores, the predecessor's files give `legacy` alone.

| name | definition |
|---|---|
| `answer` | mean over layers of the gate's good ratio on answer tokens |
| `legacy` | mean over layers of sigmoid(mean raw score over all tokens), the predecessor's |
| `all` | mean over layers of the gate's good ratio over all tokens |
| `nll` | minus the answer's mean negative log-likelihood given the question |
| `ifd` | minus (NLL given the question / NLL without it); IFD's authors select high ratios, here low ones are good |
| `combined` | the smallest of the row's ascending ranks by `answer`, `nll` and `ifd` (ties: mean rank) |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.router_data import RouterData

SCORES = ("answer", "legacy", "all", "nll", "ifd", "combined")
NEEDS = {
    "answer": "it needs a judge with gates; the predecessor's files do not hold it",
    "legacy": "it needs a judge with gates",
    "all": "it needs a judge with gates; the predecessor's files do not hold it",
    "nll": "route with nll=true",
    "ifd": "route with nll=true ifd=true",
    "combined": "it needs answer, nll and ifd",
}
"""Where a score comes from, for those who miss it."""

Floats = npt.NDArray[np.float64]


def score(data: RouterData, name: str) -> Floats:
    """The score of every row.

    Args:
        data: router data of N rows.
        name: one of `SCORES`.

    Returns:
        [N] float64, higher is better, NaN where the row has none (no answer token).

    Raises:
        UserError: an unknown name, or a score that no row has; the message names those that there are.
    """
    if name not in SCORES:
        raise UserError(f"score {name!r} is unknown; known: {', '.join(SCORES)}")
    there = available(data)
    if name not in there:
        raise UserError(f"the router data have no score {name!r} ({NEEDS[name]}); they have {_listed(there)}")
    match name:
        case "answer":
            return _mean(data.good_ratio_answer.astype(np.float64))
        case "legacy":
            return _mean(1 / (1 + np.exp(-data.quality_score.astype(np.float64))))
        case "all":
            return _mean(data.good_ratio.astype(np.float64))
        case "nll":
            return -data.nll
        case "ifd":
            base = np.where(data.nll_unconditional > 0, data.nll_unconditional, np.nan)
            return np.negative(data.nll / base)
        case _:  # combined
            return _smallest_rank([score(data, part) for part in ("answer", "nll", "ifd")])


def available(data: RouterData) -> list[str]:
    """The scores that these router data can give, in the order of `SCORES`."""
    nll = bool(np.isfinite(data.nll).any())
    there = {
        "answer": bool(data.good_ratio_answer.shape[1]),
        "legacy": bool(data.quality_score.shape[1]),
        "all": bool(data.good_ratio.shape[1]),
        "nll": nll,
        "ifd": nll and bool(np.isfinite(data.nll_unconditional).any()),
    }
    there["combined"] = there["answer"] and there["ifd"]
    return [name for name in SCORES if there[name]]


def table(data: RouterData, names: Sequence[str] = SCORES) -> dict[str, Floats]:
    """Scores by name, all NaN for one that there is not."""
    there = available(data)
    return {name: score(data, name) if name in there else np.full(len(data), np.nan) for name in names}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none (method=router_only needs none)"


def _mean(values: Floats) -> Floats:
    """[N, L] -> [N], summed layer by layer: the same bits whatever N is."""
    total = np.zeros(len(values))
    for layer in range(values.shape[1]):
        total += values[:, layer]
    mean: Floats = total / values.shape[1]
    return mean


def _smallest_rank(parts: list[Floats]) -> Floats:
    out = np.full(len(parts[0]), np.nan)
    whole = np.isfinite(np.stack(parts)).all(axis=0)
    if whole.any():
        out[whole] = np.min([mean_ranks(part[whole]) for part in parts], axis=0)
    return out


def mean_ranks(values: Floats) -> Floats:
    """Ascending ranks from 1; equal values share their mean rank.

    Args:
        values: [N], no NaN.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


def auc(good: npt.ArrayLike, bad: npt.ArrayLike) -> float:
    """How often a good row scores above a bad one (Mann-Whitney; ties count half).

    Args:
        good: scores of good rows.
        bad: scores of bad rows; rows without a score (NaN) are left out on both sides.

    Returns:
        0.5 for a coin, 1 for a perfect ranking; NaN when a side is empty.
    """
    above = np.asarray(good, dtype=np.float64)
    below = np.asarray(bad, dtype=np.float64)
    above, below = above[~np.isnan(above)], below[~np.isnan(below)]
    if not len(above) or not len(below):
        return float("nan")
    ranks = mean_ranks(np.concatenate([above, below]))[: len(above)]
    return float((ranks.sum() - len(above) * (len(above) + 1) / 2) / (len(above) * len(below)))
