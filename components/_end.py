"""What the components at the end of a run do: the verdict's numbers, the gate, the exit handler.

Imported inside the components' functions, as `components._shell`. No command runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from components._shell import note, task
from selectmoe import journal, manifest, runlog, sending
from selectmoe.errors import UserError


def keep_result(result: Any, plan: str, work_root: str, page: Any, numbers: Any, name: str = "report.html") -> None:
    """Hand on what the report says: the page for KFP's viewer, the verdict's numbers, and where the report lies."""
    shutil.copyfile(Path(result.path, name), page.path)
    results = json.loads(Path(result.path, "results.json").read_text(encoding="utf-8"))
    verdict = results["verdict"]
    for arm in verdict["arms"]:
        for key in ("effect", "p", "smallest_visible_effect"):
            numbers.log_metric(f"{arm['name']}_{key}", float(arm[key]))
        numbers.log_metric(f"{arm['name']}_low", float(arm["ci95"][0]))
        numbers.log_metric(f"{arm['name']}_high", float(arm["ci95"][1]))
    _as_file(numbers)
    result.metadata["verdict"] = verdict["verdict"]
    identity = manifest.read_manifest(result.path, verify=False).identity
    runlog.keep_result(work_root, plan, result.uri, results["sentence"], identity)


def show_summary(result: Any, summary: Any) -> None:
    """Hand on summary.md for KFP's viewer."""
    shutil.copyfile(Path(result.path, "summary.md"), summary.path)


def gate(result: str, mode: str, code: str, work_root: str) -> None:
    """Let the run fail where the report says no and the gate is `fail`."""
    from selectmoe.report import gate as judge

    with task("gate", work_root) as record:
        record.entry["code"] = code
        judge(Path(result), mode)


def finish(succeeded: bool, work_root: str, summary: Any, cost: Any) -> None:
    """Say what the run did, send what MLflow missed, tell the webhook; nothing of it can fail the run."""
    found = runlog.tell(work_root, succeeded)
    text = runlog.markdown(found)
    Path(summary.path).write_text(text, encoding="utf-8")
    for stage, seconds in found["seconds"].items():
        cost.log_metric(f"seconds_{stage}", seconds)
    cost.log_metric("accelerator_hours", found["accelerator_hours"])
    _as_file(cost)
    note(stage="finish")
    print(text, flush=True)
    if journal.enabled() and not os.environ.get(sending.DEFER):
        try:
            sending.sync(work_root)
        except UserError as error:
            print(f"{error}; when it is back: selectmoe sync {work_root}", file=sys.stderr)
    if said := runlog.post(found):
        print(said, flush=True)


def _as_file(metrics: Any) -> None:
    """Give metrics a file as well: KFP keeps them as metadata, and its cache takes an artifact without one for lost."""
    Path(metrics.path).write_text(json.dumps(metrics.metadata, sort_keys=True) + "\n", encoding="utf-8")
