"""One definition per score: `pytest tests/unit/test_scores.py`."""

from __future__ import annotations

import numpy as np
import pytest

from selectmoe.errors import UserError
from selectmoe.router_data import RouterData
from selectmoe.scores import SCORES, auc, available, mean_ranks, score, table


def router_data(n: int) -> RouterData:
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(2, n, 3)).astype(np.float32)
    ratio = (1 / (1 + np.exp(-quality))).astype(np.float32)
    return RouterData(
        dataset=["d"] * n,
        id=[f"r{i:03d}" for i in range(n)],
        tokens=rng.integers(10, 99, n),
        answer_tokens=rng.integers(1, 9, n),
        truncated=np.zeros(n, bool),
        nll=rng.random(n) + 1,
        nll_unconditional=rng.random(n) + 2,
        answer_bytes=rng.integers(1, 99, n),
        quality_score=quality[0],
        good_ratio=ratio[0],
        quality_score_answer=quality[1],
        good_ratio_answer=ratio[1],
        router_probs=rng.dirichlet(np.ones(4), size=(n, 3)).astype(np.float32),
    )


def test_spec7_21_each_name_has_the_one_definition_of_the_specification() -> None:
    data = router_data(20)
    assert np.allclose(score(data, "answer"), data.good_ratio_answer.mean(axis=1))
    assert np.allclose(score(data, "all"), data.good_ratio.mean(axis=1))
    assert np.allclose(score(data, "legacy"), (1 / (1 + np.exp(-data.quality_score))).mean(axis=1))
    assert np.array_equal(score(data, "nll"), -data.nll)
    assert np.allclose(score(data, "ifd"), -data.nll / data.nll_unconditional)
    ranks = [mean_ranks(score(data, name)) for name in ("answer", "nll", "ifd")]
    assert np.array_equal(score(data, "combined"), np.min(ranks, axis=0))


@pytest.mark.parametrize("name", [name for name in SCORES if name != "combined"])
def test_a_score_of_a_row_does_not_depend_on_which_rows_stand_beside_it(name: str) -> None:
    data = router_data(50)
    assert np.array_equal(score(data, name)[:10], score(data.take(range(10)), name))


def test_spec7_22_a_row_without_answer_tokens_has_no_score() -> None:
    data = router_data(10)
    data.good_ratio_answer[3] = np.nan
    data.nll[3] = np.nan
    for name in ("answer", "nll", "ifd", "combined"):
        values = score(data, name)
        assert np.flatnonzero(np.isnan(values)).tolist() == [3]
    assert np.isfinite(score(data, "all")).all()


def test_scores_that_were_not_computed_are_absent_not_zero() -> None:
    data = router_data(5)
    data.nll[:] = np.nan
    data.nll_unconditional[:] = np.nan
    assert available(data) == ["answer", "legacy", "all"]
    for name, advice in (("nll", "nll=true"), ("ifd", "ifd=true"), ("combined", "answer, nll and ifd")):
        with pytest.raises(UserError, match=f"no score '{name}'.*{advice}.*they have answer, legacy, all"):
            score(data, name)
        assert np.isnan(table(data)[name]).all()
    assert np.isfinite(table(data)["answer"]).all()


@pytest.mark.parametrize("nll", [True, False])
def test_a_judge_without_gates_has_no_gate_scores(nll: bool) -> None:
    data = router_data(5)
    for name in ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer"):
        setattr(data, name, np.zeros((5, 0), np.float32))
    if not nll:
        data.nll[:] = data.nll_unconditional[:] = np.nan
    assert available(data) == (["nll", "ifd"] if nll else [])
    listed = "nll, ifd" if nll else r"none \(method=router_only needs none\)"
    with pytest.raises(UserError, match=f"no score 'answer' .*needs a judge with gates.*; they have {listed}"):
        score(data, "answer")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'quality' is unknown; known: answer, legacy"):
        score(router_data(2), "quality")


def test_mean_ranks_share_ties() -> None:
    assert mean_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_auc_counts_pairs_and_ties_half() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    pairs = np.sign(good[:, None] - bad[None, :])
    assert auc(good, bad) == pytest.approx((pairs + 1).mean() / 2)
    assert auc([2, 3], [0, 1]) == 1
    assert auc([0, 1], [2, 3]) == 0
    assert auc([1, 1], [1]) == 0.5
    assert auc([2, np.nan], [1, np.nan]) == 1
    assert np.isnan(auc([], [1.0]))
    assert np.isnan(auc([np.nan], [1.0]))
