"""Work shared out to processes: one function, many tasks, results as they come; in this process where one is enough.

No command runs this module (the worker processes do: `main`); `ingest` and `check` read and write through it.

Not `multiprocessing`: its processes import the caller's script again, and live on when the caller is killed. Ours are plain
children that take pickled tasks on stdin and give pickled results on stdout. They end as soon as stdin does, hence with
whoever started them, however that one ended. A child has one task at a time, so that nothing piles up.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, TypeVar

from selectmoe.errors import Unavailable, UserError
from selectmoe.memory import give_back

Task = TypeVar("Task")
Result = TypeVar("Result")

FRUGAL = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Environment of the workers: Arrow's memory goes back to the system, too. What the user has set stays as it is."""
_number = 0


def number() -> int:
    """Which worker this process is, from 0; 0 where there is one only."""
    return _number


def cores(threads: int = 0) -> int:
    """Processes that are worth starting: `threads` where it is set, else the cores that this process may use."""
    return threads or len(os.sched_getaffinity(0))


class Workers:
    """So many processes, started when they are first needed and ended with the block.

    Args:
        count: of processes; with 1 everything happens in this one.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            if kind is not None:
                child.kill()
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):
                    _is(pipe).close()
            child.wait()
        self._children = []

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results of a function for every task, as they come.

        Args:
            function: defined at the top of a module; in the workers it is imported from there.
            tasks: picklable, and their results, too. They are taken one by one, when a worker is free.

        Raises:
            Exception: what the function raised.
            Unavailable: a worker was killed.
        """
        if self.count == 1:
            yield from map(function, tasks)
            return
        if not self._children:
            self._children = [_start(n) for n in range(self.count)]
        results: queue.SimpleQueue[tuple[bool, Any] | None] = queue.SimpleQueue()
        shared, over = _Shared(tasks), threading.Event()
        threads = [
            threading.Thread(target=_serve, args=(child, function, shared, results, over), daemon=True)
            for child in self._children
        ]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                answer = results.get()
                if answer is None:
                    left -= 1
                elif answer[0]:
                    yield answer[1]
                else:
                    raise answer[1]
        finally:
            over.set()


class _Shared:
    """An iterator that several threads may take from."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> Any:
        with self._lock:
            return next(self._items)


def _serve(
    child: subprocess.Popen[bytes],
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    results: queue.SimpleQueue[tuple[bool, Any] | None],
    over: threading.Event,
) -> None:
    """Give one child its tasks and hand its results on; None when there are no more."""
    try:
        for task in tasks:
            if over.is_set():
                break
            try:
                pickle.dump((function, task), _is(child.stdin), protocol=5)
                _is(child.stdin).flush()
                results.put(pickle.load(_is(child.stdout)))
            except (OSError, EOFError, ValueError):
                ended = (
                    f"a worker process was killed ({_ending(child)}): is the memory short? workers=1 takes the least"
                )
                results.put((False, Unavailable(ended)))
                break
    except BaseException as error:  # of the iterator of tasks
        results.put((False, error))
    results.put(None)


def _ending(child: subprocess.Popen[bytes]) -> str:
    with suppress(subprocess.TimeoutExpired):
        code = child.wait(5)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "it answers no more"


def _is(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _start(worker: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-c", f"from selectmoe.workers import main; main({worker})"]
    environment = FRUGAL | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def main(worker: int) -> None:
    """Do the tasks that come on stdin until it ends."""
    global _number
    _number = worker
    give_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to the parent as well, who ends us
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among them
    tasks: queue.SimpleQueue[tuple[Callable[[Any], Any], Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()
    while True:
        function, task = tasks.get()
        try:
            answer: tuple[bool, Any] = (True, function(task))
        except BaseException as error:
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
            answer = (False, error)
        results.write(_packed(answer))
        results.flush()


def _receive(tasks: queue.SimpleQueue[Any]) -> None:
    """Take tasks from stdin; when it ends, so does the process, in the middle of what it does."""
    while True:
        try:
            tasks.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)


def _packed(answer: tuple[bool, Any]) -> bytes:
    try:
        return pickle.dumps(answer, protocol=5)
    except Exception as error:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}: {answer[1]!r}")), protocol=5)
