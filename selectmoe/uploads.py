"""What MLflow gets of a finished output: its title, its tags, its numbers and its files.

No command runs this module; `selectmoe/tracking.py` sends what it names.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selectmoe import manifest as mf
from selectmoe.journal import TAG
from selectmoe.stage import METRICS

SHARD = "route-shard-"
"""How the stage of an unmerged shard begins; what `merge` makes of the shards is uploaded."""
UPLOADS = {
    "ingest": ["rejected.jsonl"],
    "pretrain": [],
    "upcycle": [],
    "convert": [],
    SHARD: [],
    "finetune": ["adapter_*", "*.json", "*.jsonl"],
}
"""What is uploaded beside the manifest (globs over paths); a stage that is not named uploads everything."""
BY_REFERENCE = ("pretrain", "upcycle", "convert")


def title(stage: str, config: Mapping[str, Any]) -> str:
    """The name of a stage's run."""
    return f"{stage} {config['arm']}:{config['seed']}" if "arm" in config else stage


def tags_of(place: str, manifest: mf.Manifest) -> dict[str, str]:
    """The tags by which an output's run can be found; `place` is where a checkpoint stays."""
    tags = {f"{TAG}{key}": str(getattr(manifest, key)) for key in ("stage", "version", "identity", "checksum")}
    tags[f"{TAG}work"] = manifest.key
    tags |= {f"{TAG}input.{name}": entry["identity"] for name, entry in manifest.inputs.items()}
    if manifest.stage in BY_REFERENCE:
        tags[f"{TAG}checkpoint"] = json.dumps({"uri": place, "digest": manifest.identity}, sort_keys=True)
    return tags


def numbers(output: Path, manifest: mf.Manifest) -> list[dict[str, Any]]:
    """All numbers of a finished output: its metrics by step, and what its manifest counts."""
    made = int(time.time() * 1000)
    points = []
    if (output / METRICS).is_file():
        entries = map(json.loads, (output / METRICS).read_text(encoding="utf-8").splitlines())
        for e in entries:
            points.append(
                {"name": e["name"], "value": e["value"], "step": e.get("step", 0), "ms": int(e["time"] * 1000)}
            )
    counts = {name: manifest.environment[name] for name in ("seconds", "peak_rss_bytes")}
    counts |= {"rows_in": manifest.rows["in"], "rows_out": manifest.rows["out"]}
    return points + [{"name": f"stage/{n}", "value": float(v), "step": 0, "ms": made} for n, v in counts.items()]


def uploads(output: Path, manifest: mf.Manifest) -> list[Path]:
    """The files of an output that MLflow gets: its manifest, and what a person wants to browse."""
    kind = SHARD if manifest.stage.startswith(SHARD) else manifest.stage
    globs = UPLOADS.get(kind, ["*"])
    files = [p for p in sorted(output.rglob("*")) if p.is_file() and not mf.RESERVED & set(p.relative_to(output).parts)]
    checkpoints = "checkpoint-*"
    return [
        path
        for path in files
        if path.relative_to(output).as_posix() == mf.NAME
        or (
            not fnmatch.fnmatch(path.relative_to(output).parts[0], checkpoints)
            and any(fnmatch.fnmatch(path.relative_to(output).as_posix(), glob) for glob in globs)
        )
    ]
