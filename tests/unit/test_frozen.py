"""The digest of what must not change: pytest tests/unit/test_frozen.py"""

import pytest
import torch
from torch import nn

from selectmoe.frozen import frozen_digest, frozen_tensors


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1, dtype=torch.bfloat16))
    return made.requires_grad_(False)


def test_the_digest_is_that_of_names_dtypes_shapes_and_bytes():
    assert frozen_digest(model()) == frozen_digest(model())
    assert set(frozen_tensors(model())) == {*dict(model().named_parameters()), *dict(model().named_buffers())}


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "2.weight"])
def test_a_single_bit_is_seen(name):
    changed = model()
    tensor = frozen_tensors(changed)[name]
    tensor.view(torch.uint8)[..., 0] ^= 1
    assert frozen_digest(changed) != frozen_digest(model())


def test_another_dtype_or_shape_is_seen_and_what_is_trained_is_not():
    for change in (lambda m: m[0].double(), lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.T, False))):
        changed = model()
        change(changed)
        assert frozen_digest(changed) != frozen_digest(model())
    one, two = model(), model()
    for made in (one, two):
        made[0].weight.requires_grad_(True)
    two[0].weight.data += 1
    assert frozen_digest(one) == frozen_digest(two) != frozen_digest(model())
