"""`merge` in this process: pytest components/merge"""

from components.merge.component import merge
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(merge)
