"""`route` in this process: pytest components/route"""

from components.route.component import route
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(route)
