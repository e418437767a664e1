"""The verdict: .venv/bin/python -m pytest tests/unit/test_verdict.py"""

import json

import numpy as np
import pytest

from selectmoe import verdict as v
from selectmoe.errors import UserError


def draw(rng, seeds, n, effect=0.0, seed_sd=0.01, example_sd=0.05, rest_sd=0.03, base=None):
    """[seeds, n] bits per byte of an arm whose true mean is 1 - effect."""
    base = np.zeros(n) if base is None else base
    own = rng.normal(0, example_sd, n)
    return 1 - effect + base + own + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, rest_sd, (seeds, n))


@pytest.mark.parametrize(
    ("seeds", "n", "seed_sd", "example_sd", "rest_sd"),
    [(3, 120, 0.01, 0.02, 0.03), (3, 60, 0.002, 0.08, 0.03), (3, 60, 0.02, 0.01, 0.01), (5, 120, 0.01, 0.05, 0.05)],
)
def test_interval_covers_what_it_promises(seeds, n, seed_sd, example_sd, rest_sd):
    rng, hits, runs = np.random.default_rng(7), 0, 500
    strata, weights = np.arange(n) % 4, np.ones(n)
    for _ in range(runs):
        base = rng.normal(0, 0.3, n)
        arm = draw(rng, seeds, n, 0.01, seed_sd, example_sd, rest_sd, base)
        e = v.estimate(arm, draw(rng, seeds, n, 0.0, seed_sd, example_sd, rest_sd, base), weights, strata)
        one = v.compare("a", e, p=0.0, family=1, control=False, seeds=seeds, examples=n)
        hits += one.ci95[0] <= 0.01 <= one.ci95[1]
    assert 0.90 <= hits / runs <= 0.985


def test_smallest_visible_effect_is_seen_four_times_in_five():
    rng, n, runs = np.random.default_rng(3), 80, 300
    weights, strata = np.ones(n), np.zeros(n)
    reach = np.median(
        [
            v._reach((e := v.estimate(draw(rng, 5, n), draw(rng, 5, n), weights, strata)).error, e.df, 0.05)
            for _ in range(99)
        ]
    )
    seen = sum(
        v._p_value(v.estimate(draw(rng, 5, n, reach), draw(rng, 5, n), weights, strata)) < 0.05 for _ in range(runs)
    )
    assert 0.7 <= seen / runs <= 0.92


def test_metric_is_bits_per_byte_averaged_over_sources():
    values = np.array([[8.0, 2.0, 9.0]])
    assert v.metric_values(values, np.array([4.0, 1.0, 3.0]), np.array(["a", "a", "b"])) == pytest.approx((2 + 3) / 2)


def test_ratio_errors_agree_with_the_jackknife():
    rng, n = np.random.default_rng(0), 400
    weights = rng.lognormal(4, 0.8, n)
    strata = np.arange(n) % 2
    arm, random = (np.repeat(weights * rng.normal(1, 0.2, n), 3).reshape(n, 3).T for _ in range(2))
    e = v.estimate(arm, random, weights, strata)
    out = []
    for j in range(n):
        keep = np.arange(n) != j
        out.append(
            (
                v.metric_values(random[:1, keep], weights[keep], strata[keep])
                - v.metric_values(arm[:1, keep], weights[keep], strata[keep])
            )[0]
        )
    assert e.error == pytest.approx(np.sqrt((n - 1) * np.var(out)), rel=0.03)


def test_three_answers_and_controls_outside_of_the_family():
    rng, n = np.random.default_rng(1), 150
    base = rng.normal(0, 0.3, n)
    values = {
        "random": draw(rng, 5, n, base=base),
        "selected": draw(rng, 5, n, 0.2, base=base),
        "nll": draw(rng, 5, n, -0.2, base=base),
        "legacy": draw(rng, 5, n, 0.0, base=base),
        "oracle": draw(rng, 5, n, 0.3, base=base),
    }
    result = v.judge(values, np.ones(n), ["x"] * n, metric="holdout")
    assert result.verdict == v.BEATS
    answers = {arm.name: arm.verdict for arm in result.arms}
    assert answers == {"selected": v.BEATS, "nll": v.WORSE, "legacy": v.NONE, "oracle": v.BEATS}
    assert [a.name for a in result.arms if a.control] == ["oracle"]
    assert result.visible is True
    assert "selected beats random" in result.sentence
    fields = {"name", "verdict", "effect", "ci95", "p", "df", "smallest_visible_effect"}
    content = json.loads(json.dumps(result.json(), allow_nan=False))
    assert set(content) == {"verdict", "metric", "arms", "seeds", "examples"}
    assert all(set(arm) == fields for arm in content["arms"])
    assert result.details()["arms"]["oracle"] == {"control": True, "seeds": 5, "advice": ""}
    alone = v.judge({k: values[k] for k in ("random", "selected", "oracle")}, np.ones(n), ["x"] * n, metric="holdout")
    assert alone.arms[0].p < result.arms[0].p
    assert alone.arms[1].p == result.arms[-1].p
    up = v.judge({k: -a for k, a in values.items()}, np.ones(n), ["x"] * n, metric="m", lower_is_better=False)
    assert up.arms == result.arms


def test_a_blind_run_says_so():
    rng, n = np.random.default_rng(2), 60
    values = {name: draw(rng, 3, n) for name in ("random", "selected", "oracle")}
    result = v.judge(values, np.ones(n), ["x"] * n, metric="holdout")
    assert result.verdict == v.NONE
    assert result.visible is False
    assert "could not have seen an effect" in result.sentence
    assert result.sentence == f"{result.answer} {result.blindness}" == result.details()["sentence"]
    assert "examples" in result.arms[0].advice
    assert result.arms[0].smallest_visible_effect > abs(result.arms[0].effect)


def test_an_effect_without_the_controls_is_doubted_and_not_denied():
    rng, n = np.random.default_rng(2), 60
    values = {name: draw(rng, 3, n) for name in ("random", "selected", "oracle")}
    values["selected"] -= 3
    result = v.judge(values, np.ones(n), ["x"] * n, metric="holdout")
    assert (result.verdict, result.visible) == (v.BEATS, False)
    assert "could not have seen" not in result.sentence
    assert "positive control does not beat random, though it should" in result.sentence


def test_equal_arms_are_no_evidence_and_finite():
    same = np.ones((3, 10)) * np.arange(10)
    result = v.judge({"random": same, "selected": same}, np.ones(10), ["x"] * 10, metric="m")
    assert (result.verdict, result.arms[0].effect, result.arms[0].p) == (v.NONE, 0.0, 1.0)
    assert result.visible is None
    json.dumps(result.json(), allow_nan=False)


def test_holm():
    assert v.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"selected": np.ones((3, 9))}, "needs arm random"),
        ({"selected": np.ones((2, 9)), "random": np.ones((3, 9))}, "at least 3"),
        ({"selected": np.ones((3, 8)), "random": np.ones((3, 9))}, "same 9 examples"),
        ({"selected": np.full((3, 9), np.nan), "random": np.ones((3, 9))}, "not finite"),
    ],
)
def test_what_cannot_be_judged(values, message):
    with pytest.raises(UserError, match=message):
        v.judge(values, np.ones(9), ["x"] * 9, metric="m")
