import pytest
import torch

from selectmoe import device
from selectmoe.errors import UserError


def test_a_last_step_gone_astray_is_an_error():
    fine, broken = torch.ones(3), torch.tensor([1.0, float("nan")])
    device.require_finite([fine], "training.learning_rate=0.1")
    with pytest.raises(UserError, match=r"not finite: lower training\.learning_rate=0\.1"):
        device.require_finite([fine, broken], "training.learning_rate=0.1")
