"""`evaluate` in this process: pytest components/evaluate"""

from components.evaluate.component import evaluate
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.in_process(evaluate)
