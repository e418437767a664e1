"""What `make run` shows of a run: what the stages print, without KFP's own chatter, which goes to the log with the rest.

No command runs this module; `python -m pipelines.local run` does.
"""

from __future__ import annotations

import io
import json
import re
import threading
from typing import TextIO

from selectmoe.entry import STOPPING


class Screen(io.TextIOBase):
    """Everything goes to the log; the screen gets what the stages print, without KFP's executor and its input.

    One line is handled at a time, per thread: KFP runs two iterations of a loop at once.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self.screen = screen
        self.log = log
        self.lock = threading.Lock()
        self.here = threading.local()

    def write(self, text: str) -> int:
        """Take text; whole lines are passed on."""
        pending = getattr(self.here, "pending", "") + text
        *lines, self.here.pending = pending.split("\n")
        for line in lines:
            with self.lock:
                self.log.write(line + "\n")
                self.log.flush()
                if shown := self._shown(line):
                    self.screen.write(shown + "\n")
                    self.screen.flush()
        return len(text)

    def _shown(self, line: str) -> str:
        if STOPPING.is_set():
            return ""
        task = re.search(r"Executing task \S*'([a-z0-9-]+)'", line)
        if task:
            self.here.task = re.sub(r"-\d+$", "", task.group(1))
            self.here.skipped = None
            return f"[{self.here.task}]"
        bare = line.strip()
        skipped: str | None = getattr(self.here, "skipped", None)
        if skipped is not None:  # inside the executor's input, a JSON object over many lines
            self.here.skipped = skipped + bare
            if bare == "}" and _is_json(self.here.skipped):
                self.here.skipped = None
            return ""
        if "Got executor_input:" in bare:
            self.here.skipped = ""
            return ""
        logged = re.match(r"\d\d:\d\d:\d\d\.\d+ - [A-Z]+ - |\[KFP Executor |-{20,}$|\s*$", bare)
        outputs = re.match(
            r"\w+: (Dataset|Model|HTML|Artifact)\( name=|uri='.*',$|metadata=\{|\w+: '|\w+: \[",
            bare,
        )
        if logged or outputs or not hasattr(self.here, "task"):
            return ""
        return f"[{self.here.task}] {bare.removeprefix(f'{self.here.task}: ')}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
