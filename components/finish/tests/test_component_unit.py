"""`finish` in this process: pytest components/finish"""

from pathlib import Path

import pytest
from kfp import dsl

from components import _shell
from components.finish.component import finish
from tests.component import Alone, environment


def test_it_says_why_a_run_failed(alone: Alone) -> None:
    with environment(), pytest.raises(RuntimeError), _shell.task("merge", str(alone.work)):
        raise RuntimeError("the disk is full")
    status = dsl.PipelineTaskFinalStatus("FAILED", "run", "pipeline", 1, "")
    found = alone.in_process(finish, status=status)
    said = Path(found["summary"].path).read_text(encoding="utf-8")
    assert "merge" in said
    assert "the disk is full" in said
    assert found["cost"].metadata["accelerator_hours"] == 0.0


def test_a_run_that_succeeded_has_no_reason(alone: Alone) -> None:
    found = alone.in_process(finish)
    assert "fail" not in Path(found["summary"].path).read_text(encoding="utf-8")
