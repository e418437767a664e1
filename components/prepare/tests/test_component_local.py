"""`prepare` with KFP's local runner: pytest components/prepare"""

from components.prepare.component import prepare
from selectmoe import manifest as mf
from tests.component import Alone


def test_what_it_proved_comes_back_as_parameters(alone: Alone) -> None:
    found = alone.locally(prepare)
    assert found["router_identity"] == mf.identity_of(alone.chain.path("merge"))
    assert (found["tuned"], found["arm_seeds"]) == ("no", [])
