"""`gate` with KFP's local runner: pytest components/gate"""

import pytest

from components.gate.component import gate
from tests.component import Alone


def test_the_run_fails_where_the_gate_does(alone: Alone) -> None:
    with pytest.raises(RuntimeError, match="gate"):
        alone.locally(gate, mode="fail")
