"""`warmup` in this process: pytest components/warmup"""

from components.warmup.component import warmup
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(warmup)
