"""`compare` with KFP's local runner: pytest components/compare"""

from components.compare.component import compare
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.locally(compare)
