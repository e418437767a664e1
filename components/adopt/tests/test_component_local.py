"""`adopt` with KFP's local runner: pytest components/adopt"""

from components.adopt.component import adopt
from tests.component import Alone


def test_a_checkpoint_is_handed_on_as_it_is(alone: Alone) -> None:
    assert alone.locally(adopt) == {"model": alone.chain.reference("pretrain")}
