"""The learning rate by step: pytest tests/unit/test_schedule.py"""

import math

import pytest

from selectmoe.schedule import SCHEDULERS, learning_rate


def test_linear_rises_and_falls():
    rates = [learning_rate(i, 10, 1.0, 0.2) for i in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert learning_rate(0, 1, 1.0, 0.03) == 1.0


def test_cosine_and_constant():
    assert [learning_rate(i, 4, 2.0, 0.0, "constant") for i in range(4)] == [2.0] * 4
    rates = [learning_rate(i, 4, 2.0, 0.0, "cosine") for i in range(4)]
    assert rates == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(4)])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(scheduler, ratio):
    assert all(0 < learning_rate(i, 7, 0.5, ratio, scheduler) <= 0.5 for i in range(7))
