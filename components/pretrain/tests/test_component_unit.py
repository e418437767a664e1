"""`pretrain` in this process: pytest components/pretrain"""

from components.pretrain.component import pretrain
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(pretrain)
