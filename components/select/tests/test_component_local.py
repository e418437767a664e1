"""`select` with KFP's local runner: pytest components/select"""

from components.select.component import select
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.locally(select)
