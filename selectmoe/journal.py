"""The journal: what MLflow is to be told lies in `WORK_ROOT/journal/` first, and is taken away when MLflow has it.

No command runs this module; `selectmoe/stage.py` and `selectmoe/tracking.py` write to it, `tracking.Sender` reads it.
A file is a sequence of JSON lines in the order in which things happened. In a folder, a stage appends to one file that
it keeps locked while it lives: an unlocked file is complete. On S3 nothing can be appended: every few seconds an object
with the new lines is put. Each file begins with what its lines are about, so that any of them can be sent alone.

Records, by `do`: `parent` and `parent_end` (the run of a whole pipeline), `stage` (a stage began), `metric`,
`stage_end` (how it ended) and `output` (what it made). Writing a line costs some 10 microseconds and waits for nobody.
"""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from selectmoe.distributed import rank
from selectmoe.storage import LocalStore, open_store

FOLDER = "journal"
TAG = "select_moe."
SYSTEM_SECONDS = "SELECTMOE_SYSTEM_SECONDS"
"""Environment variable: seconds between two samples of CPU, memory and GPU (10)."""
PARENT = "SELECTMOE_PARENT_RUN"
"""Environment variable: the run in MLflow that a task belongs below."""
ROOT = "SELECTMOE_JOURNAL"
"""Environment variable: the work root whose journal takes what stages say, where it is not their own."""
PUT_SECONDS = 5.0
"""How often the new lines are put as an object where nothing can be appended."""
WRITER = f"{os.getpid():x}{secrets.token_hex(3)}"
"""Part of the names of the files that this process writes."""
_numbers = itertools.count()


def enabled() -> bool:
    """Whether there is an MLflow to tell, and this process is the one of its group (torchrun) that does."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) and rank() == 0


def place(work_root: str) -> str:
    """Where the journal of a work root lies."""
    return f"{work_root.rstrip('/')}/{FOLDER}"


def _name() -> str:
    return f"{time.time_ns():020d}-{WRITER}-{next(_numbers):04d}.jsonl"


def note(work_root: str, record: Mapping[str, Any]) -> str:
    """Write one record as a file of its own; returns the file's name."""
    name = _name()
    open_store(place(work_root)).put_bytes(name, _line(record).encode())
    return name


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def names(work_root: str, writer: str = "") -> list[str]:
    """The journal's files, oldest first; of one process only, if it is named."""
    found = (n for n in open_store(place(work_root)).names() if n.endswith(".jsonl") and "/" not in n)
    return sorted(n for n in found if f"-{writer}" in n)


def read(work_root: str, name: str, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file from an offset on, and the offset after them."""
    store = open_store(place(work_root))
    if isinstance(store, LocalStore):
        path = store.root / name
        if not path.is_file():
            return [], offset
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    else:
        data = (store.get(name) or b"")[offset:]
    data = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in data.splitlines()], offset + len(data)


def remove(work_root: str, name: str, offset: int) -> bool:
    """Take a file away whose lines were sent up to `offset`, unless its writer lives or wrote more."""
    store = open_store(place(work_root))
    if isinstance(store, LocalStore) and (store.root / name).is_file():
        with open(store.root / name, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if file.seek(0, os.SEEK_END) > offset and read(work_root, name, offset)[0]:
                return False
    store.delete(name)
    return True


class StageJournal:
    """What a running stage says: its beginning, its metrics as they come, samples of the machine, a failure."""

    def __init__(self, work_root: str, run: Mapping[str, Any]) -> None:
        self.work_root = work_root
        self.head = {"do": "stage", **run}
        self.lines: list[str] = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.file = self._open() if isinstance(open_store(place(work_root)), LocalStore) else None
        if self.file is None:
            self._put([])
        self.samples = importlib.util.find_spec("psutil") is not None  # it comes with the extra `tracking`, as mlflow
        interval = float(os.environ.get(SYSTEM_SECONDS, "10"))
        self.thread = threading.Thread(target=self._beside, args=(interval,), daemon=True)
        self.thread.start()

    def _open(self) -> Any:
        """The file gets its name when it is locked and has its first line."""
        path = Path(place(self.work_root), _name())
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(_line(self.head))
        file.flush()
        temporary.rename(path)
        return file

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Say a number, at once."""
        self._write(_line({"do": "metric", "name": name, "value": value, "step": step or 0, "ms": now()}))

    def _write(self, line: str) -> None:
        with self.lock:
            if self.file is None:
                self.lines.append(line)
            elif not self.file.closed:
                self.file.write(line)
                self.file.flush()

    def close(self, status: str, message: str = "", tags: Mapping[str, str] | None = None) -> None:
        """The stage is over: finished (its output is noted by itself), failed, or killed."""
        if self.over.is_set():
            return
        self.over.set()
        self.thread.join()
        self.sample()
        end = {"do": "stage_end", "status": status, "message": message[:500], "tags": dict(tags or {}), "ms": now()}
        self._write(_line(end))
        if self.file is not None:
            self.file.close()
        elif self.lines:
            self._put(self.lines)

    def _put(self, lines: list[str]) -> None:
        open_store(place(self.work_root)).put_bytes(_name(), "".join([_line(self.head), *lines]).encode())

    def _beside(self, interval: float) -> None:
        """Sample the machine; put what cannot be appended. Object storage being away costs metrics' delay, no work."""
        sampled = put = time.monotonic()
        self.sample()
        while not self.over.wait(min(interval, PUT_SECONDS)):
            if time.monotonic() - sampled >= interval:
                self.sample()
                sampled = time.monotonic()
            if self.file is None and time.monotonic() - put >= PUT_SECONDS:
                with self.lock:
                    taken, self.lines = self.lines, []
                try:
                    if taken:
                        self._put(taken)
                except Exception as error:  # boto3's kinds; tried again with what came meanwhile
                    print(f"the journal could not be put ({type(error).__name__}); tried again", file=sys.stderr)
                    with self.lock:
                        self.lines = taken + self.lines
                put = time.monotonic()

    def sample(self) -> None:
        """CPU, memory and GPU, under MLflow's own names, so that its page shows them as system metrics."""
        step = int(time.time())
        for name, value in machine().items() if self.samples else ():
            self._write(_line({"do": "metric", "name": f"system/{name}", "value": value, "step": step, "ms": now()}))


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


def machine() -> dict[str, float]:
    """How busy the machine is, as far as it can be asked without waiting."""
    import psutil

    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / 1e6,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
            found[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
    return found


@cache
def context() -> dict[str, str]:
    """Tags that say where a process comes from: commit, image, KFP's run."""
    named = {"image": "SELECTMOE_IMAGE", "kfp_run_id": "KFP_RUN_ID", "kfp_run_name": "KFP_RUN_NAME"}
    tags = {TAG + tag: os.environ[name] for tag, name in named.items() if os.environ.get(name)}
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return tags
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a disk that is asleep
        return tags
    return tags | ({"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {})


def family() -> dict[str, str]:
    """The run that a task belongs below, and the one that KFP opened for it, from the environment.

    A parent is a run's id, or `key:KEY` for the run that carries this key and is made where there is none.
    """
    run = os.environ.get("KFP_RUN_ID", "")
    parent = os.environ.get(PARENT, "") or (f"key:kfp-{run}" if run else "")
    return {"parent": parent, "adopt": os.environ.get("MLFLOW_RUN_ID", "")}


def open_stage(work_root: str, run: Mapping[str, Any]) -> StageJournal | None:
    """The journal of a stage that begins; None where there is no MLflow to tell, or no work root to write it to."""
    root = os.environ.get(ROOT) or work_root
    if not enabled() or not root:
        return None
    return StageJournal(root, {**run, **family(), "tags": {**run["tags"], **context()}, "ms": now()})
