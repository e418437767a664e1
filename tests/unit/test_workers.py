"""Work shared out to processes. Run: pytest tests/unit/test_workers.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selectmoe import workers
from selectmoe.errors import Unavailable, UserError
from selectmoe.workers import Workers

ROOT = Path(__file__).parents[2]


def double(n: int) -> tuple[int, int, int]:
    print("this must not get among the results")
    return 2 * n, workers.number(), os.getpid()


def refuse(n: int) -> int:
    raise UserError(f"no {n}")


def full(n: int) -> int:
    raise OSError(28, "No space left on device", "/some/file")


def die(n: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return n


def unpicklable(n: int) -> object:
    return lambda: n


@pytest.mark.parametrize("count", [1, 3])
def test_every_task_is_done_once(count: int) -> None:
    with Workers(count) as pool:
        first = list(pool.map(double, range(40)))
        again = list(pool.map(double, range(5)))
    assert sorted(result for result, _, _ in first) == list(range(0, 80, 2))
    assert sorted(result for result, _, _ in again) == list(range(0, 10, 2))
    assert {number for _, number, _ in first + again} <= set(range(count))
    processes = {pid for _, _, pid in first + again}
    assert (processes == {os.getpid()}) if count == 1 else (len(processes) <= count and os.getpid() not in processes)


@pytest.mark.parametrize("count", [1, 2])
def test_tasks_are_taken_one_by_one(count: int) -> None:
    with Workers(count) as pool:
        results = pool.map(double, iter(range(10**12)))
        assert {next(results)[0] for _ in range(3)} <= set(range(0, 100, 2))


def test_what_a_task_raises_is_raised_here() -> None:
    with Workers(2) as pool, pytest.raises(UserError, match="no 1"):
        list(pool.map(refuse, [1, 1]))
    with Workers(2) as pool, pytest.raises(OSError, match="No space left") as error:
        list(pool.map(full, [1]))
    assert (error.value.errno, error.value.filename) == (28, "/some/file")
    with Workers(2) as pool, pytest.raises(RuntimeError, match="lambda"):
        list(pool.map(unpicklable, [1]))
    with Workers(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool.map(double, (1 // n for n in (1, 0))))


def test_a_worker_that_is_killed_is_said() -> None:
    with Workers(2) as pool, pytest.raises(Unavailable, match=r"worker process was killed \(signal SIGKILL\)"):
        list(pool.map(die, [1]))


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    """The parent is killed in the middle of a task that would take ten minutes."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from test_workers import sleep
from selectmoe.workers import Workers
with Workers(2) as pool:
    list(pool.map(sleep, [{str(tmp_path)!r}] * 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    for child in children:
        while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
            time.sleep(0.05)


def sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
