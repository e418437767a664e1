"""Follow a run of the pipeline on a cluster: a progress line, and what the end means. `python -m pipelines submit`.

The server lists every node of its workflow: a task `warmup` comes as `warmup-driver`, `warmup` and `executor`, loops and
conditions come as nodes of their own. What is counted here are the tasks of the compiled pipeline that run a container.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from pipelines.kfp_api import Server
from selectmoe.errors import Refused

POLL_SECONDS = 5.0
FINISHED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
GATE = "gate"
"""The task that fails in order to say no."""
NOT_AN_ANSWER = re.compile(r"OOMKilled|Evicted|[Dd]eadline|ImagePull|exit code 1[34]\d")
"""A gate that ended like this did not say no: it did not come to say anything."""


class RunFailed(Exception):
    """The run failed or was cancelled: exit code 1."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: the tasks at work, how many are done, and of how many that are known so far."""

    running: tuple[str, ...]
    done: int
    total: int

    def line(self, seconds: float) -> str:
        """The progress line: what runs, done/total, elapsed."""
        minutes, second = divmod(int(seconds), 60)
        counted = Counter(self.running)
        at_work = ", ".join(name if n == 1 else f"{name} x{n}" for name, n in sorted(counted.items())) or "waiting"
        return f"{at_work}  {self.done}/{self.total} tasks  {minutes // 60}:{minutes % 60:02d}:{second:02d}"


def tasks(spec: Mapping[str, Any]) -> dict[str, bool]:
    """The tasks of a compiled pipeline that run a container, and whether each runs only if a condition holds."""

    def walk(dag: Mapping[str, Any], conditional: bool) -> Iterator[tuple[str, bool]]:
        for name, task in dag.get("tasks", {}).items():
            component = spec["components"][task["componentRef"]["name"]]
            perhaps = conditional or "condition" in task.get("triggerPolicy", {})
            if "dag" in component:
                yield from walk(component["dag"], perhaps)
            else:
                yield name, perhaps

    return dict(walk(spec.get("root", {}).get("dag", {}), False))


def progress(run: Any, known: Mapping[str, bool]) -> Progress:
    """How far a run is.

    Args:
        run: a `V2beta1Run`.
        known: the pipeline's tasks (`tasks`); a loop's task counts as one until its turns are there.
    """
    seen = [(str(node.display_name), str(node.state)) for node in _nodes(run) if node.display_name in known]
    missing = set(known) - {name for name, _ in seen}
    return Progress(
        running=tuple(name for name, state in seen if state == "RUNNING"),
        done=sum(state in ("SUCCEEDED", "SKIPPED") for _, state in seen),
        total=len(seen) + sum(not known[name] for name in missing),
    )


def failures(run: Any, known: Mapping[str, bool]) -> list[tuple[str, str]]:
    """The failed tasks with the server's message (empty where it gives none).

    A task fails with its own node, or with its driver's (an image, a secret or a volume that is not there). Nodes of
    loops and conditions, which fail with what is inside, are named only where nothing else failed.
    """
    nodes = _nodes(run)
    by_id = {str(key): node for node in nodes for key in (node.pod_name, node.task_id) if key}
    failed: dict[str, str] = {}
    others: dict[str, str] = {}
    for node in nodes:
        if node.state == "FAILED" and node.display_name:
            name = str(node.display_name).removesuffix("-driver")
            found = failed if name in known else others
            found[name] = found.get(name) or _message(node, by_id)
    return list((failed or dict(list(others.items())[:1])).items())


def _nodes(run: Any) -> list[Any]:
    return list((run.run_details and run.run_details.task_details) or [])


def _message(node: Any, by_id: Mapping[str, Any]) -> str:
    """What a node says of its failure, or else what the node says that it waited for."""
    errors = [node.error, *(status.error for status in reversed(node.state_history or []))]
    own = next((str(error.message) for error in errors if error is not None and error.message), "")
    if own:
        return " ".join(own.split())
    keys = [str(child.pod_name or child.task_id) for child in node.child_tasks or []]
    children = [by_id[key] for key in keys if key in by_id and by_id[key] is not node]
    return next((text for child in children if child.state == "FAILED" and (text := _message(child, by_id))), "")


def follow(server: Server, run_id: str, screen: TextIO | None = None) -> None:
    """Wait for the end of a run.

    Args:
        server: where it runs; when it does not answer, it is asked again until it does.
        run_id: the run.
        screen: where the progress line goes (default stderr): rewritten in place on a terminal, else a line whenever something changes.

    Raises:
        Refused: the gate said no.
        RunFailed: the run failed, was cancelled or skipped; names the tasks and what the server says of them.
    """
    screen = sys.stderr if screen is None else screen
    run = server.run(run_id, patient=True)
    known = tasks(server.spec(run))
    began = run.created_at.timestamp() if run.created_at else time.time()
    shown: Progress | None = None
    while True:
        now = progress(run, known)
        if screen.isatty():
            screen.write(f"\r\x1b[K{now.line(time.time() - began)}")
        elif now != shown:
            screen.write(now.line(time.time() - began) + "\n")
        screen.flush()
        shown = now
        if run.state in FINISHED:
            break
        time.sleep(POLL_SECONDS)
        run = server.run(run_id, patient=True)
    if screen.isatty():
        screen.write("\n")
    _judge(run, known, server.link(run_id))


def _judge(run: Any, known: Mapping[str, bool], link: str) -> None:
    if run.state == "SUCCEEDED":
        return
    if run.state != "FAILED":
        raise RunFailed(f"the run was {str(run.state).lower()}: {link}")
    failed = failures(run, known)
    overall = " ".join(str(run.error.message).split()) if run.error is not None and run.error.message else ""
    if failed and all(name == GATE and not NOT_AN_ANSWER.search(text) for name, text in failed):
        raise Refused(f"the gate said no: {failed[0][1] or 'its reasons are in its log and in the report'} ({link})")
    reasons = [f"{name} failed: {text or overall or 'the reason is in its log'}" for name, text in failed]
    raise RunFailed(f"{'; '.join(reasons) or overall or 'the run failed before any task'} ({link})")
