"""`prepare` in this process: pytest components/prepare"""

import json

import pytest

from components.prepare.component import prepare
from selectmoe import manifest as mf
from tests.component import Alone


def test_it_proves_what_a_sweep_starts_from(alone: Alone) -> None:
    found = alone.in_process(prepare)
    for name, stage in (("router_identity", "merge"), ("pool_identity", "ingest")):
        assert found[name] == mf.identity_of(alone.chain.path(stage))
    assert json.loads(found["select"])["selection_rows"] == 12
    assert json.loads(found["baseline"])["arms"] == ["random", "top-nll"]
    assert (found["tuned"], found["arm_seeds"]) == ("no", [])


def test_another_stages_output_is_a_mistake(alone: Alone, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        alone.in_process(prepare, pool=alone.chain.path("select"))
    assert end.value.code == 2
    assert "is an output of select, not of ingest" in capsys.readouterr().err
