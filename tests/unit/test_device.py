import pytest
import torch

from selectmoe import device
from selectmoe.errors import UserError


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    try:
        assert device.set_threads(0) == torch.get_num_threads() == 2
        assert device.set_threads(3) == 3
    finally:
        torch.set_num_threads(before)


def test_noise_belongs_to_its_place_and_to_nothing_before_it():
    drawn = []
    for place in [(1, 2, 3), (1, 3, 2), (1, 2, 3)]:
        device.seed_for(*place)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_last_step_gone_astray_is_an_error():
    fine, broken = torch.ones(3), torch.tensor([1.0, float("nan")])
    device.require_finite([fine], "training.learning_rate=0.1")
    with pytest.raises(UserError, match=r"not finite: lower training\.learning_rate=0\.1"):
        device.require_finite([fine, broken], "training.learning_rate=0.1")
