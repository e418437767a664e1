"""The quality losses, against their formulas. Run: pytest tests/unit/test_losses.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from selectmoe import allowed_code
from selectmoe.errors import UserError
from selectmoe.loss_parameters import DEFAULTS, check_loss
from selectmoe.losses import LOSSES, histogram_entropy, quality_loss

SCORE = torch.tensor([[0.5, -1.0, 2.0, 9.0], [0.1, -0.3, 7.0, 7.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
GOOD = torch.sigmoid(SCORE)
VALID = GOOD[MASK.bool()].double().numpy()
LABELS: dict[str, Any] = {"row_labels": torch.tensor([1, 0]), "answer_mask": torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]])}


def value(name: str, **params: Any) -> float:
    extra = LABELS if name == "contrastive" else {}
    return float(quality_loss(name, [SCORE], MASK, params, **extra))


def test_values_are_those_of_the_formulas() -> None:
    rows = (VALID[:3].mean() + VALID[3:].mean()) / 2
    assert value("sigmoid") == pytest.approx(rows, abs=1e-6)
    assert value("sigmoid", sample_wise_averaging=False) == pytest.approx(VALID.mean(), abs=1e-6)
    assert value("mse", target=1.0, sample_wise_averaging=False) == pytest.approx(((VALID - 1) ** 2).mean(), abs=1e-6)
    mu, var = VALID.mean(), VALID.var()
    want = 2 * (mu - 0.6) ** 2 + 3 * (var - 0.1) ** 2
    given = {"beta_target_mean": 0.6, "beta_target_var": 0.1, "w_mean": 2.0, "w_var": 3.0}
    assert value("beta_moment_matching", **given) == pytest.approx(want, abs=1e-6)
    assert value("mean_variance_regularization", lambda_var=0.4) == pytest.approx((mu - 0.5) ** 2 - 0.4 * var, abs=1e-6)
    bce = (-np.log(GOOD[0, 1:3].numpy()).mean() - np.log(1 - GOOD[1, 1].item())) / 2
    assert value("contrastive") == pytest.approx(bce, abs=1e-6)


def test_entropy_is_that_of_a_smooth_histogram_in_nats() -> None:
    centres = (np.arange(20) + 0.5) / 20
    kernel = np.clip(1 - 20 * np.abs(VALID[:, None] - centres), 0, None).sum(0)
    p = kernel / kernel.sum()
    want = -(p[p > 0] * np.log(p[p > 0])).sum()
    assert float(histogram_entropy(GOOD, MASK.bool())) == pytest.approx(want, abs=1e-5)
    mu = VALID.mean()
    assert value("entropy", lambda_entropy=0.2) == pytest.approx((mu - 0.5) ** 2 - 0.2 * want, abs=1e-5)
    even = torch.linspace(0.025, 0.975, 20)[None]
    assert float(histogram_entropy(even, torch.ones(1, 20))) == pytest.approx(np.log(20), abs=1e-4)


def test_the_layers_are_averaged_and_shapes_with_a_last_one_are_taken() -> None:
    two = quality_loss("sigmoid", [SCORE[..., None], SCORE[..., None] - 3], MASK)
    one = (quality_loss("sigmoid", [SCORE], MASK) + quality_loss("sigmoid", [SCORE - 3], MASK)) / 2
    torch.testing.assert_close(two, one)


@pytest.mark.parametrize("name", LOSSES)
def test_spec7_01_02_every_loss_has_the_gradient_that_finite_differences_give(name: str) -> None:
    score = (SCORE * 0.4).clone().requires_grad_()
    extra = LABELS if name == "contrastive" else {}
    quality_loss(name, [score], MASK, None, **extra).backward()
    assert score.grad is not None
    assert score.grad.abs().max() > 0
    assert (score.grad[MASK == 0] == 0).all()
    for row, token in ((0, 1), (1, 1)):
        step = torch.zeros_like(SCORE)
        step[row, token] = 1e-2
        up, down = (float(quality_loss(name, [score.detach() + s], MASK, None, **extra)) for s in (step, -step))
        assert float(score.grad[row, token]) == pytest.approx((up - down) / 2e-2, abs=2e-3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("level", [-200.0, 0.0, 200.0])
def test_spec7_03_finite_with_one_valid_token_or_none(name: str, valid: int, level: float) -> None:
    score = torch.full((2, 4), level, requires_grad=True)
    mask = torch.zeros(2, 4)
    mask[0, :valid] = 1
    loss = quality_loss(name, [score], mask, None, torch.tensor([1, 0]), torch.ones(2, 4))
    loss.backward()
    assert loss.isfinite()
    assert score.grad is not None
    assert score.grad.isfinite().all()


def test_spec7_05_unknown_losses_and_parameters_are_errors_that_list_the_known() -> None:
    with pytest.raises(UserError, match=r"'beta' is unknown.*beta_moment_matching"):
        quality_loss("beta", [SCORE], MASK)
    with pytest.raises(UserError, match=r"'lambda'.*lambda_var"):
        check_loss("mean_variance_regularization", {"lambda": 1})
    assert check_loss("mse", {"target": 1})["target"] == 1


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("mse", {"target": "high"}, "target='high' must be a number"),
        ("mse", {"target": True}, "must be a number"),
        ("mse", {"target": 1.5}, "at least 0, at most 1"),
        ("sigmoid", {"sample_wise_averaging": 1}, "true or false"),
        ("entropy", {"lambda_entropy": float("nan")}, "must be a number"),
        ("beta_moment_matching", {"beta_target_var": 0.3}, r"at most 0\.25"),
        ("beta_moment_matching", {"w_mean": -1}, "at least 0"),
        ("contrastive", {"margin": 1}, "knows: none"),
    ],
)
def test_values_of_parameters_are_checked(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_loss(name, params)


def test_every_loss_has_its_parameters_and_no_other() -> None:
    assert LOSSES.keys() == DEFAULTS.keys()


def half(good: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (good * mask).sum() / 2


def sum_of_masks(good: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask.sum()


def test_a_loss_of_ones_own_is_called_where_it_is_allowed() -> None:
    path, flat = f"{__name__}:half", f"{__name__}:sum_of_masks"
    with pytest.raises(UserError, match=r"names code, which no checkpoint may: .*with allow_code="):
        quality_loss(path, [SCORE], MASK)
    allowed_code.allow([path, flat])
    try:
        assert float(quality_loss(path, [SCORE], MASK)) == pytest.approx(VALID.sum() / 2)
        with pytest.raises(UserError, match="unknown key 'x'"):
            check_loss(path, {"x": 1})
        with pytest.raises(UserError, match="must give a scalar tensor that has a gradient"):
            quality_loss(flat, [SCORE.clone().requires_grad_()], MASK)
    finally:
        allowed_code.allow([])


def test_contrastive_without_labels_is_an_error() -> None:
    with pytest.raises(UserError, match="row_labels"):
        quality_loss("contrastive", [SCORE], MASK)
