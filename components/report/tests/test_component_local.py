"""`report` with KFP's local runner: pytest components/report"""

from components.report.component import report
from tests.component import Alone


def test_it_writes_what_the_chain_wrote(alone: Alone) -> None:
    alone.locally(report)
