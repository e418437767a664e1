"""`verify` with KFP's local runner: pytest components/verify"""

from components.verify.component import verify
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.locally(verify)
