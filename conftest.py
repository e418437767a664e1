"""What tests of every kind share: the tiny chain, made once for all of pytest's processes (`tests/component.py`).

Every pytest process reads this file, its controller too: heavy imports stand inside the fixtures.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.component import Alone, Chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """`selectmoe run preset=tiny` with two shards, finished."""
    from tests.component import Chain

    base = tmp_path_factory.getbasetemp()
    found = Chain((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "chain")
    found.make()
    return found


@pytest.fixture
def alone(chain: Chain, tmp_path: Path) -> Alone:
    """Runs one component on what the chain wrote."""
    from tests.component import Alone

    return Alone(chain, tmp_path)
