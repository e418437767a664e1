"""Every test process takes its own share of the cores: two processes with two threads each would wait for each other."""

from __future__ import annotations

import os

WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = sorted(os.sched_getaffinity(0))
if len(CORES) >= WORKERS > 1:
    os.sched_setaffinity(0, CORES[int(WORKER.removeprefix("gw")) :: WORKERS])
