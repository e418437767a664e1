"""`ingest` in this process: pytest components/ingest"""

from components.ingest.component import ingest
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(ingest)
