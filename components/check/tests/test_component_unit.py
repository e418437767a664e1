"""`check` in this process: pytest components/check"""

import json

from components.check.component import check
from tests.component import Alone


def test_it_hands_on_what_the_chain_resolved(alone: Alone) -> None:
    found, plan = alone.in_process(check), alone.chain.checked
    for stage, config in plan["stages"].items():
        assert json.loads(found[stage]) == config | ({"gate": "off"} if stage == "report" else {}), "a step of its own"
    assert found["arm_seeds"] == plan["arm_seeds"]
    assert found["route_shards"] == ["0/2", "1/2"]
    assert (found["judge"], found["pool_digest"]) == (plan["judge"], plan["digests"]["pool"])
    assert found["checked"].metadata["plan"] == found["plan"]
