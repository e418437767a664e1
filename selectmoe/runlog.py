"""What the tasks of one pipeline run did, why it failed and what it cost: noted by every task, told by the last one.

No command runs this module; the pipeline's exit handler and `python -m pipelines.local run` read what it holds. A task
writes `WORK_ROOT/runs/RUN/STAGE-X.json` when it starts and again when it ends, so that one that was killed is seen as
well; `tell` puts them together in `WORK_ROOT/runs/RUN.json`. `WORK_ROOT/results/PLAN.json` says where the report of a
plan lies: a run in which everything came from the cache finds it there.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
import uuid
from typing import Any

from selectmoe.storage import open_store

RUN = "SELECTMOE_RUN_ID"
"""Environment variable: the name of the pipeline run; without it nothing is noted."""
WEBHOOK = "SELECTMOE_WEBHOOK"
"""Environment variable, from a Secret: the address to which the exit handler posts its summary."""
TIMEOUT = 10.0
"""Seconds that the webhook may take."""


class Record:
    """One execution of one task."""

    def __init__(self, work_root: str, stage: str, **facts: Any) -> None:
        """Note that a task starts.

        Args:
            work_root: folder or s3:// URI.
            stage: its stage.
            facts: what else is to be known, such as the accelerators that it was given.
        """
        run = os.environ.get(RUN, "")
        self.store = open_store(f"{work_root}/runs/{run}") if run else None
        self.name = f"{stage}-{uuid.uuid4().hex[:12]}.json"
        self.entry: dict[str, Any] = {"stage": stage, "started": time.time(), **facts}
        self._write()

    def end(self, code: int = 0, message: str = "", **facts: Any) -> None:
        """Note that it ended, with an exit code and, where that is not 0, the reason."""
        seconds = round(time.time() - self.entry["started"], 3)
        self.entry |= {"seconds": seconds, "exit": code, "message": message, **facts}
        self._write()

    def _write(self) -> None:
        if self.store is not None:
            self.store.put_bytes(self.name, json.dumps(self.entry, sort_keys=True).encode())


def keep_result(work_root: str, plan: str, uri: str, verdict: str, identity: str) -> None:
    """Note where the report of a plan lies, its sentence and its identity."""
    store = open_store(f"{work_root}/results")
    found = {"report": uri, "verdict": verdict, "identity": identity}
    store.put_bytes(f"{plan}.json", json.dumps(found, sort_keys=True).encode())


def result(work_root: str, plan: str) -> dict[str, str] | None:
    """What `keep_result` noted; None where the plan has no report yet."""
    found: dict[str, str] | None = json.loads(open_store(f"{work_root}/results").get(f"{plan}.json") or b"null")
    return found


def tell(work_root: str, succeeded: bool) -> dict[str, Any]:
    """Put together what the tasks of this run noted.

    Args:
        work_root: folder or s3:// URI.
        succeeded: whether the pipeline did, as the orchestrator says.

    Returns:
        run, succeeded, stage and reason of the first failure (empty: none), tasks {stage: executions}, seconds
        {stage: sum}, accelerator_hours; report, verdict and identity of the report (empty: none). What came from the cache is in none of them.
    """
    run = os.environ.get(RUN, "unknown")
    store = open_store(f"{work_root}/runs/{run}")
    entries = sorted((json.loads(store.get(name) or b"{}") for name in store.names()), key=lambda e: e["started"])
    failed = _failure(entries) if not succeeded else None
    seconds: dict[str, float] = {}
    tasks: dict[str, int] = {}
    hours = 0.0
    for entry in entries:
        spent = entry.get("seconds", 0.0)
        seconds[entry["stage"]] = round(seconds.get(entry["stage"], 0.0) + spent, 3)
        tasks[entry["stage"]] = tasks.get(entry["stage"], 0) + 1
        hours += spent / 3600 * entry.get("count", 0)
    plan = next((entry["plan"] for entry in entries if "plan" in entry), "")
    found = (result(work_root, plan) if plan else None) or {"report": "", "verdict": "", "identity": ""}
    summary = {
        "run": run,
        "succeeded": succeeded,
        "stage": failed[0] if failed else "",
        "reason": failed[1] if failed else "",
        "tasks": tasks,
        "seconds": seconds,
        "accelerator_hours": round(hours, 4),
        **found,
    }
    open_store(f"{work_root}/runs").put_bytes(f"{run}.json", json.dumps(summary, sort_keys=True).encode())
    store.clear()
    return summary


def _failure(entries: list[dict[str, Any]]) -> tuple[str, str]:
    """Stage and reason of the first task that failed for good: the last attempt of a retried one counts."""
    for entry in entries:
        again = any(later.get("exit") == 0 for later in entries if later["stage"] == entry["stage"])
        if entry.get("exit") and not again:
            return entry["stage"], f"exit {entry['exit']}: {entry['message']}"
    for entry in entries:
        if "exit" not in entry:
            return entry["stage"], "killed: it started and did not end (out of memory, evicted, or timed out)"
    return "unknown", "no task said why: a pod that could not start (image, volume, quota), or the orchestrator"


def markdown(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [f"# Run {summary['run']}: {'succeeded' if summary['succeeded'] else 'failed'}", ""]
    if not summary["succeeded"]:
        lines += [f"**{summary['stage']}**: {summary['reason']}", ""]
    if summary["verdict"]:
        lines += [f"Verdict: {summary['verdict']}", "", f"Report: `{summary['report']}`", ""]
    lines += ["| stage | executions | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {n} | {summary['seconds'][name]:.1f} |" for name, n in summary["tasks"].items()]
    total = sum(summary["seconds"].values())
    lines += ["", f"{total:.0f} s of work, {summary['accelerator_hours']:.2f} accelerator hours; the rest was cached."]
    return "\n".join(lines) + "\n"


def post(summary: dict[str, Any]) -> str:
    """Post the summary to the webhook, where there is one.

    Returns:
        What became of it, without the address (it may hold a token): empty where there is no webhook.
    """
    address = os.environ.get(WEBHOOK, "")
    if not address:
        return ""
    # `text` is what the usual chat services show.
    body = json.dumps({"text": markdown(summary), **summary}).encode()
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return f"webhook: {answer.status}"
    except (OSError, ValueError) as error:  # ValueError: not an address at all
        return f"webhook: failed ({type(error).__name__} {getattr(error, 'code', '')})".replace(" )", ")")
