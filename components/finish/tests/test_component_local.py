"""`finish` with KFP's local runner, behind a task that ends well: pytest components/finish"""

from kfp import dsl

from components.finish.component import finish
from components.reuse.component import reuse
from tests.component import Alone


def test_it_runs_when_the_run_has_ended(alone: Alone) -> None:
    given = alone.arguments(reuse)

    @dsl.pipeline(name="alone-finish")
    def run() -> None:
        with dsl.ExitHandler(finish(work_root=str(alone.work)), name="run"):
            reuse(**given)

    alone.execute(run)
    (summary,) = alone.out.glob("*/finish/summary")
    assert "reuse" in summary.read_text(encoding="utf-8")
