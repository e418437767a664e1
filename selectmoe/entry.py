"""What surrounds every command: exit codes, one line for a mistake, signals, a reader that has gone (docs/design.md, "Errors").

No command runs this module; `selectmoe.cli` and `pipelines.local` enter through it.

A signal is not an exception here: a run that may be killed at any instant and goes on from its last commit needs no
unwinding, and unwinding through other people's thread pools waits for the work that was to be interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from selectmoe.errors import Refused, Unavailable, UserError

STOPPING = threading.Event()
"""Set when a signal ends this process: what the killed children still say is of no interest."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a file that has no room left."""
_spared: set[int] = set()
_endings: list[Callable[[], None]] = []


def enter(name: str, body: Callable[[], int]) -> int:
    """Do the work of a command, and turn every way in which it can end into an exit code and at most one line.

    Args:
        name: what the line begins with.
        body: the work; returns the exit code.

    Returns:
        0 done, 1 our fault or the world's (after a trace, unless it is a server that does not answer), 2 the user's input, 3 the answer is no, 141 where the reader of
        our output has gone. SIGINT and SIGTERM end the process with 130 and 143.
    """
    try:
        with _signals(name):
            code = body()
            sys.stdout.flush()
    except UserError as error:
        return _say(name, str(error), 2)
    except Refused as error:
        return _say(name, str(error), 3)
    except Unavailable as error:
        return _failed(name, error, trace=False)
    except BrokenPipeError as error:
        if not _reader_gone():
            return _failed(name, error)
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _disk_full(name, error) if error.errno in FULL else _failed(name, error)
    except Exception as error:
        return _failed(name, error)
    return code


def spare(pid: int) -> None:
    """Leave this child alone when a signal ends this process: it is to outlive it."""
    _spared.add(pid)


@contextlib.contextmanager
def ending(work: Callable[[], None]) -> Iterator[None]:
    """End other work than child processes, too, when a signal ends this process meanwhile.

    Args:
        work: called in the signal's handler; an error of its own is said and changes nothing.
    """
    _endings.append(work)
    try:
        yield
    finally:
        _endings.remove(work)


def _say(name: str, text: str, code: int) -> int:
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
    return code


def _disk_full(name: str, error: OSError) -> int:
    """One line: what was committed before is whole, since every commit is written beside its place and renamed."""
    where = "; ".join(part for part in (str(error.filename or ""), *getattr(error, "__notes__", [])) if part)
    text = f"{error.strerror}{f' ({where})' if where else ''}: make room; the same command goes on from its last commit"
    return _say(name, f"failed: {text}", 1)


def _failed(name: str, error: Exception, trace: bool = True) -> int:
    """The trace, then one line: what failed, at what stage (the notes of the error), and where it can be read again."""
    if trace:
        traceback.print_exception(error)
    notes = "; ".join(getattr(error, "__notes__", []))
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _say(name, f"failed{f' ({notes})' if notes else ''}: {text}", 1)


@contextlib.contextmanager
def at_stage(stage: str, log: Path | None = None) -> Iterator[None]:
    """Note on an unexpected error at which stage it came up, and keep its trace in a file.

    Args:
        stage: its name.
        log: where the trace is written; None: nowhere.
    """
    try:
        yield
    except (UserError, Refused, Unavailable, BrokenPipeError):
        raise
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"stage {stage}")
        if log is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
                error.add_note(f"log {log}")
        raise


def _reader_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads; it is then silenced, so that the exit says nothing either."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


@contextlib.contextmanager
def _signals(name: str) -> Iterator[None]:
    """End at once on SIGINT and SIGTERM, with one line and without leaving a child behind."""

    def stop(number: int, _frame: FrameType | None) -> None:
        STOPPING.set()
        _kill_children()
        line = f"{name}: interrupted; the same command goes on from here\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # not print: the signal may have come in the middle of one
        for end in _endings:
            try:
                end()
            except Exception as error:
                _say(name, f"not ended: {error}", 1)
        _kill_children()  # what a thread has started meanwhile
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_children() -> None:
    """Kill every descendant of this process, except those that are spared (and theirs)."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    waiting = [os.getpid()]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            if pid not in _spared:
                waiting.append(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)


def _processes() -> list[tuple[int, int]]:
    """(process, parent) of every process, from /proc or, where there is none, from ps."""
    if Path("/proc/self/stat").exists():
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    fields = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
                    found.append((int(entry.name), int(fields.split()[1])))
        return found
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    return [(int(pid), int(parent)) for pid, parent in map(str.split, listed.splitlines())]
