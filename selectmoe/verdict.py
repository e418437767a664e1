"""The verdict: did an arm beat random, how sure is that, and what is the smallest effect this run could have seen?

No command runs this module; `report` reads the examples' values and calls `judge`. Statistics only: NumPy and SciPy.

Estimand: E over training seeds of the arm's metric, minus E over draws and training seeds of random's. Examples are paired
between the arms, seeds are not. With y the metric's linearised share of one example, every arm is a two-way crossed layout

    y[s, j] = mean + seed[s] + example[j] + rest[s, j]

and the variance of the difference of two arms' means is

    (seed_a + rest_a / n) / S_a + (seed_r + rest_r / n) / S_r + example_{a-r} / n

estimated from mean squares (A. B. Owen, "The pigeonhole bootstrap", 2007, for the decomposition), with a t interval whose
degrees of freedom are Satterthwaite's (1946), and Holm's (1979) correction over the arms. Sources (strata) are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from selectmoe.errors import UserError

Array = npt.NDArray[np.float64]

BEATS = "beats_random"
NONE = "no_evidence"
WORSE = "worse_than_random"
ALPHA = 0.05
"""Two-sided error of every test and interval. No setting: `verdict.json` calls the interval `ci95`, and the coverage that
was measured of this method was measured at 95 %."""
MIN_SEEDS = 3
POWER = 0.8
MOST_SEEDS = 200
"""More training seeds than these are not advised."""


@dataclass(frozen=True)
class Variances:
    """Variance components of the difference between an arm's mean and random's, in squared units of the metric.

    Attributes:
        seed: of the training seeds, arm's plus random's.
        example: of the examples, after averaging over seeds.
        rest: of seed and example together, arm's plus random's.
    """

    seed: float
    example: float
    rest: float

    def error(self, seeds: float, examples: float) -> float:
        """Standard error of the effect with that many seeds (per arm) and examples."""
        return math.sqrt(self.seed / seeds + self.example / examples + self.rest / (seeds * examples))


@dataclass(frozen=True)
class Arm:
    """One arm against random; `effect` and what is compared with it are in units of the metric, positive = better."""

    name: str
    verdict: str
    effect: float
    ci95: tuple[float, float]
    p: float
    """Two-sided; after Holm's correction where the arm belongs to the family."""
    df: float
    smallest_visible_effect: float
    """What this run would have called better or worse with a probability of 80 %, at the first step of Holm's procedure."""
    control: bool
    seeds: int
    advice: str

    def json(self) -> dict[str, Any]:
        """The arm in `verdict.json`; control, seeds and advice stand in `results.json` (`Verdict.details`)."""
        names = ("name", "verdict", "effect", "p", "df", "smallest_visible_effect")
        return {name: getattr(self, name) for name in names} | {"ci95": list(self.ci95)}


@dataclass(frozen=True)
class Verdict:
    """The answer of a run, and the arms behind it."""

    verdict: str
    metric: str
    arms: list[Arm]
    seeds: int
    examples: int
    baseline: str = "random"
    unit: str = "bits per byte"

    @property
    def visible(self) -> bool | None:
        """Whether the positive control beat random: the run could have seen an effect. None: there was no control."""
        controls = [arm.verdict == BEATS for arm in self.arms if arm.control]
        return any(controls) if controls else None

    @property
    def sentence(self) -> str:
        """The verdict in plain words: the answer, and whether the run was blind."""
        return f"{self.answer} {self.blindness}".strip()

    @property
    def answer(self) -> str:
        """The subject's answer with its numbers."""
        return _answer(self)

    @property
    def blindness(self) -> str:
        """What is to be said where the positive control did not beat random; else nothing."""
        if self.visible is not False:
            return ""
        if self.arms[0].verdict != NONE:
            return (
                f"But its positive control does not beat {self.baseline}, though it should: more seeds or rows "
                "have to confirm this."
            )
        return f"This run could not have seen an effect: its positive control does not beat {self.baseline} either."

    def json(self) -> dict[str, Any]:
        """The content of `verdict.json`."""
        names = ("verdict", "metric", "seeds", "examples")
        return {name: getattr(self, name) for name in names} | {"arms": [arm.json() for arm in self.arms]}

    def details(self) -> dict[str, Any]:
        """What `results.json` says beyond `verdict.json`."""
        arms = {arm.name: {"control": arm.control, "seeds": arm.seeds, "advice": arm.advice} for arm in self.arms}
        return {"sentence": self.sentence, "visible": self.visible, "arms": arms}


@dataclass(frozen=True)
class _Estimate:
    effect: float
    error: float
    df: float
    variances: Variances


def metric_values(values: Array, weights: Array, strata: npt.NDArray[Any]) -> Array:
    """[S]: the metric of every seed, the mean over strata of sum(values) / sum(weights).

    Args:
        values: [S, n], such as bits of the answers.
        weights: [n], such as their bytes; ones where the values are averaged.
        strata: [n], the source of each example.
    """
    groups = [strata == name for name in np.unique(strata)]
    ratios = [values[:, g].sum(axis=1) / weights[g].sum() for g in groups]
    return np.asarray(np.mean(ratios, axis=0), dtype=np.float64)


def _influence(values: Array, weights: Array, strata: npt.NDArray[Any]) -> Array:
    """[S, n] linearised shares y, whose mean over examples varies as the metric does.

    Of stratum g (of G, with n_g of n examples): y = (v - ratio_g w) / (mean w in g) * n / (n_g G), ratio_g over all seeds.
    """
    y = np.zeros_like(values)
    names = np.unique(strata)
    for name in names:
        g = strata == name
        ratio = values[:, g].sum() / (weights[g].sum() * len(values))
        scale = len(strata) / (weights[g].sum() * len(names))
        y[:, g] = (values[:, g] - ratio * weights[g]) * scale
    return y


def _within(y: Array, strata: npt.NDArray[Any]) -> Array:
    """The rows of y, centred in every stratum."""
    out = y.copy()
    for name in np.unique(strata):
        g = strata == name
        out[..., g] -= y[..., g].mean(axis=-1, keepdims=True)
    return out


def estimate(arm: Array, random: Array, weights: Array, strata: npt.NDArray[Any]) -> _Estimate:
    """Random's metric minus the arm's, its standard error, degrees of freedom and variance components.

    Args:
        arm: [S_a, n] values of the arm.
        random: [S_r, n] values of random, same examples in the same order.
        weights: [n].
        strata: [n].
    """
    n, free = arm.shape[1], arm.shape[1] - len(np.unique(strata))
    effect = float(metric_values(random, weights, strata).mean() - metric_values(arm, weights, strata).mean())
    seed_terms, rest_terms, seed_parts, rest_parts, means = [], [], [], [], []
    for values in (arm, random):
        s = len(values)
        y = _influence(values, weights, strata)
        centred = _within(y, strata)
        rest = float(((centred - centred.mean(axis=0)) ** 2).sum() / ((s - 1) * free))
        of_seeds = float(metric_values(values, weights, strata).var(ddof=1))  # expects seed + rest / n
        seed_terms.append((of_seeds / s, s - 1))
        rest_terms.append((rest / (s * n), (s - 1) * free))
        seed_parts.append(max(of_seeds - rest / n, 0.0))
        rest_parts.append(rest)
        means.append(y.mean(axis=0))
    difference = _within(means[0] - means[1], strata)
    of_examples = float((difference**2).sum() / free)  # expects example + rest / S
    seed_total, rest_total = sum(t for t, _ in seed_terms), sum(t for t, _ in rest_terms)
    example_total = max(of_examples / n - rest_total, 0.0)
    variance = max(seed_total, rest_total) + example_total
    terms = [*seed_terms, (of_examples / n, free), *rest_terms]
    spread = sum(t**2 / df for t, df in terms)
    df = variance**2 / spread if spread > 0 else float(free)
    components = Variances(sum(seed_parts), example_total * n, sum(rest_parts))
    return _Estimate(effect, math.sqrt(variance), max(df, 1.0), components)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    adjusted, worst = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = worst
    return adjusted


def _p_value(e: _Estimate) -> float:
    if e.error == 0:
        return 1.0 if e.effect == 0 else 0.0
    return float(2 * stats.t.sf(abs(e.effect) / e.error, e.df))


def _reach(error: float, df: float, alpha: float) -> float:
    """The effect that a two-sided test at `alpha` finds with 80 % power (sum of two t quantiles)."""
    return float((stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(POWER, df)) * error)


def advise(effect: float, variances: Variances, seeds: int, examples: int, alpha: float = ALPHA) -> str:
    """How many seeds, or else examples, would decide an effect of the size that was seen; in plain words."""
    if effect == 0:
        return "no number of seeds or examples decides an effect of exactly nothing"
    size = abs(effect)
    for s in range(seeds + 1, MOST_SEEDS + 1):
        if _reach(variances.error(s, examples), 2 * (s - 1), alpha) <= size:
            return f"{s} seeds with the same {examples} examples would decide an effect of this size"
    for more in (2, 3, 5, 10, 20, 50):
        for s in (seeds, 2 * seeds, 4 * seeds, 10 * seeds):
            if _reach(variances.error(s, examples * more), 2 * (s - 1), alpha) <= size:
                return f"about {examples * more} examples with {s} seeds would decide an effect of this size"
    return "an effect of this size is too small to be decided by any practicable number of seeds and examples"


def compare(name: str, e: _Estimate, *, p: float, family: int, control: bool, seeds: int, examples: int) -> Arm:
    """The arm's answer from its estimate and its (corrected) p value; `family` is the number of arms in Holm's family."""
    half = float(stats.t.ppf(1 - ALPHA / 2, e.df)) * e.error
    verdict = NONE if p >= ALPHA else BEATS if e.effect > 0 else WORSE
    return Arm(
        name=name,
        verdict=verdict,
        effect=e.effect,
        ci95=(e.effect - half, e.effect + half),
        p=p,
        df=e.df,
        smallest_visible_effect=_reach(e.error, e.df, ALPHA / family),
        control=control,
        seeds=seeds,
        advice="" if verdict != NONE else advise(e.effect, e.variances, seeds, examples, ALPHA / family),
    )


def judge(
    values: Mapping[str, Array],
    weights: Array,
    strata: Sequence[str],
    *,
    metric: str,
    unit: str = "bits per byte",
    lower_is_better: bool = True,
    subject: str = "selected",
    baseline: str = "random",
    controls: Collection[str] = ("oracle",),
) -> Verdict:
    """Compare every arm with random.

    Args:
        values: arm -> [seeds, n]; the same n examples in the same order for every arm.
        weights: [n], what the values are divided by (bytes), or ones.
        strata: [n], the source of each example; the metric is the mean over sources.
        metric: its name, for `verdict.json`.
        unit: of an effect, for the sentence.
        lower_is_better: whether less is better, as with bits.
        subject: the arm whose answer is the run's.
        baseline: the arm that the others are compared with.
        controls: arms outside of Holm's family.

    Raises:
        UserError: the baseline or the subject is missing, an arm has fewer than three seeds, examples do not pair, or a
            value is not finite.
    """
    w, labels = np.asarray(weights, dtype=np.float64), np.asarray(strata)
    _check(values, w, labels, (baseline, subject))
    sign = 1.0 if lower_is_better else -1.0
    arrays = {name: sign * np.asarray(v, dtype=np.float64) for name, v in values.items()}
    names = sorted((n for n in arrays if n != baseline), key=lambda n: (n != subject, n in controls, n))
    estimates = {n: estimate(arrays[n], arrays[baseline], w, labels) for n in names}
    family = [n for n in names if n not in controls]
    p = {n: _p_value(estimates[n]) for n in names}
    p |= dict(zip(family, holm([p[n] for n in family]), strict=True))
    examples = len(w)
    arms = [
        compare(
            n,
            estimates[n],
            p=p[n],
            family=1 if n in controls else len(family),
            control=n in controls,
            seeds=min(len(arrays[n]), len(arrays[baseline])),
            examples=examples,
        )
        for n in names
    ]
    seeds = min(len(v) for v in arrays.values())
    return Verdict(arms[0].verdict, metric, arms, seeds, examples, baseline, unit)


def _check(values: Mapping[str, Array], weights: Array, strata: npt.NDArray[Any], needed: tuple[str, ...]) -> None:
    for name in needed:
        if name not in values:
            raise UserError(f"the verdict needs arm {name}; there is {', '.join(sorted(values)) or 'none'}")
    if len(strata) != len(weights) or not (weights > 0).all():
        raise UserError("the verdict needs one source and one positive weight per example")
    if len(weights) < len(np.unique(strata)) + 2:
        raise UserError(
            f"the verdict needs more than {len(weights)} examples: at least two more than there are sources"
        )
    for name, array in values.items():
        if array.ndim != 2 or array.shape[1] != len(weights):
            raise UserError(f"arm {name} was not evaluated on the same {len(weights)} examples as the others")
        if len(array) < MIN_SEEDS:
            raise UserError(f"arm {name} has {len(array)} training seeds: a verdict needs at least {MIN_SEEDS}")
        if not np.isfinite(array).all():
            raise UserError(f"arm {name} has a value that is not finite")


def _answer(verdict: Verdict) -> str:
    arm, baseline = verdict.arms[0], verdict.baseline
    low, high = arm.ci95
    numbers = (
        f"{abs(arm.effect):.4f} {verdict.unit} {'better' if arm.effect >= 0 else 'worse'} (95 % interval of the gain "
        f"{low:+.4f} to {high:+.4f}, p {arm.p:.2g}, {verdict.seeds} seeds, {verdict.examples} examples)"
    )
    if arm.verdict == BEATS:
        return f"{arm.name} beats {baseline}: {numbers}."
    if arm.verdict == WORSE:
        return f"{arm.name} is worse than {baseline}: {numbers}."
    reach = f"an effect of {arm.smallest_visible_effect:.4f} is the smallest that this run would have seen"
    return f"No evidence that {arm.name} differs from {baseline}: {numbers}; {reach}; {arm.advice}."
