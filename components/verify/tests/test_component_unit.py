"""`verify` in this process: pytest components/verify"""

from components.verify.component import verify
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(verify)
