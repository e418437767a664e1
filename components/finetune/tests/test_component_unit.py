"""`finetune` in this process: pytest components/finetune"""

from components.finetune.component import finetune
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(finetune)
