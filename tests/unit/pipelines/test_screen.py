"""pipelines/screen.py: `pytest tests/unit/pipelines/test_screen.py`."""

from __future__ import annotations

import io

from pipelines.screen import Screen

KFP = """11:16:39.279 - INFO - Executing task 'warmup-2'
11:16:39.279 - INFO - Streamed logs:

    [KFP Executor 2026-11-24 11:16:39,481 INFO]: Got executor_input:
    {
        "inputs": {
            "config": "{\\"a\\": {"
        },
        "x": {
        }
    }
    step 3, loss 0.5
    [KFP Executor 2026-11-24 11:16:39,482 INFO]: Wrote executor output file to /x/executor_output.json.

11:16:39.492 - INFO - Task 'warmup-2' outputs:
    model: 'up3'
----------------------------------------
"""


def test_the_screen_shows_what_the_stages_say() -> None:
    screen, log = io.StringIO(), io.StringIO()
    Screen(screen, log).write(KFP)
    assert screen.getvalue() == "[warmup]\n[warmup] step 3, loss 0.5\n"
    assert log.getvalue() == KFP
