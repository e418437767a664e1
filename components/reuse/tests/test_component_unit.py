"""`reuse` in this process: pytest components/reuse"""

from components.reuse.component import reuse
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(reuse)
