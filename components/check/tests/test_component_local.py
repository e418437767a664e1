"""`check` with KFP's local runner: pytest components/check"""

import json

from components.check.component import check
from tests.component import Alone


def test_what_it_proved_comes_back_as_parameters(alone: Alone) -> None:
    found, plan = alone.locally(check), alone.chain.checked
    assert json.loads(found["select"])["selection_rows"] == 12
    assert (found["arm_seeds"], found["route_shards"]) == (plan["arm_seeds"], ["0/2", "1/2"])
    assert (found["checked"] / "check.json").is_file()
