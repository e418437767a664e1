"""`convert` with KFP's local runner: pytest components/convert"""

from components.convert.component import convert
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.locally(convert)
