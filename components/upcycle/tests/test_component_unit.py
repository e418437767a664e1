"""`upcycle` in this process: pytest components/upcycle"""

from components.upcycle.component import upcycle
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(upcycle)
