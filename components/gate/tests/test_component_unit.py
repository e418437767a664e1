"""`gate` in this process: pytest components/gate"""

import json
from pathlib import Path

import pytest

from components.gate.component import gate
from tests.component import Alone


@pytest.mark.parametrize("mode", ["off", "warn", "fail"])
def test_only_fail_ends_a_run_that_does_not_beat_random(
    alone: Alone, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    found = json.loads(Path(alone.chain.path("report"), "verdict.json").read_text(encoding="utf-8"))
    assert found["verdict"] != "beats_random", "the tiny preset ranks nothing"
    if mode == "fail":
        with pytest.raises(SystemExit) as end:
            alone.in_process(gate, mode=mode)
        assert end.value.code == 3
    else:
        alone.in_process(gate, mode=mode)
    said = capsys.readouterr()
    assert ("does not beat random" in said.out + said.err) == (mode != "off")
