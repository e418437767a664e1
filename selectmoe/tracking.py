"""MLflow: one run per pipeline, a nested run per stage. The only module that imports mlflow.

    selectmoe sync WORK_ROOT        # send what MLflow missed

Nothing is sent unless `MLFLOW_TRACKING_URI` is set. MLflow being away never costs work: what could not be sent is
written to `WORK_ROOT/journal/` and replayed by `sync`. What a person wants to browse (trained weights, adapters,
router data, selections, the report) is uploaded once; pools and base and converted checkpoints are there by reference.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import manifest as mf
from selectmoe.config import flatten
from selectmoe.errors import UserError
from selectmoe.stage import METRICS
from selectmoe.storage import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "select-moe"
DEFER = "SELECTMOE_DEFER"
"""Environment variable: set where tasks leave the sending to the process that started them."""
TAG = "select_moe."
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
PROVE_SECONDS = 20.0
"""How long `prove` tries an MLflow again that does not answer."""
PARAMETER_LENGTH = 6000
"""What MLflow stores of one parameter at most."""


def enabled() -> bool:
    """Whether there is an MLflow to talk to."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def prove(uri: str, experiment: str = "", *, seconds: float = PROVE_SECONDS) -> None:
    """Prove that MLflow answers and keeps artifacts: a run, a small artifact there and back, the run deleted.

    Args:
        uri: address of the MLflow server.
        experiment: its name; default as for everything that is sent.
        seconds: how long a server that does not answer, or answers 5xx, is tried again (the import of mlflow counts).

    Raises:
        UserError: it cannot be reached, refuses us, or its artifact store is broken; the line names what to set.
    """
    deadline = time.monotonic() + seconds
    named = {"MLFLOW_EXPERIMENT_NAME": experiment} if experiment else {}
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    with _environment({"MLFLOW_TRACKING_URI": uri, **impatient, **named}):
        from mlflow.exceptions import MlflowException

        while True:
            try:
                client, number = _client()
                run = client.create_run(number, run_name="check", tags={f"{TAG}stage": "check-mlflow"})
            except (MlflowException, OSError) as error:
                message, final = _refusal(uri, error)
                if final or time.monotonic() + 1.0 > deadline:
                    raise UserError(message) from None
                time.sleep(1.0)
            else:
                break
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # MLflow closes the connection after a failed upload
        try:
            _round_trip(client, run.info.run_id)
        except Exception as error:  # the clients of all artifact stores raise their own
            where = run.info.artifact_uri
            raise UserError(
                f"MLflow at {uri} answers, but its artifact store {where} does not work ({_first_line(error)}): "
                "check --artifacts-destination and the server's S3 endpoint, bucket and credentials"
            ) from None
        finally:
            with suppress(MlflowException):  # a run that stays is harmless; the error on its way says more
                client.delete_run(run.info.run_id)


def _round_trip(client: MlflowClient, run_id: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder, "proof.txt")
        sent.write_text(run_id, encoding="utf-8")
        client.log_artifact(run_id, str(sent))
        back = Path(client.download_artifacts(run_id, sent.name, tempfile.mkdtemp(dir=folder)))
        if back.read_text(encoding="utf-8") != run_id:
            raise OSError("what came back is not what was sent")


def _refusal(uri: str, error: Exception) -> tuple[str, bool]:
    """What is wrong with an MLflow, in one line, and whether trying again is pointless."""
    text = str(error)
    if "Invalid Host header" in text:
        host = urllib.parse.urlsplit(uri).netloc
        return f"MLflow at {uri} answers 403 (Invalid Host header): start it with --allowed-hosts {host}", True
    code = error.get_http_status_code() if hasattr(error, "get_http_status_code") else 0
    if code in (401, 403) or "error code 401" in text or "error code 403" in text:
        return (
            f"MLflow at {uri} refuses us ({code}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        ), True
    if code == 404 or "in a valid JSON format" in text:
        return (
            f"what answers at {uri} is not MLflow ({_first_line(error)}): set MLFLOW_TRACKING_URI to its address",
            True,
        )
    if "error responses" in text:
        return f"MLflow at {uri} answers with errors ({_first_line(error)}): look at its log and its database", False
    return f"MLflow at {uri} cannot be reached ({_first_line(error)}): start it, or set MLFLOW_TRACKING_URI", False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][-200:]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; MLflow's clients read them at every request."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def start_parent(name: str, params: Mapping[str, Any], key: str = "") -> str:
    """The parent run of a pipeline: a new one, or the one that has the same key (the same work, started again).

    Args:
        name: shown in MLflow.
        params: the configuration of the run, nested or flat.
        key: digest of what is to be done; empty: always a new run.

    Returns:
        The run's id.
    """
    client, experiment = _client()
    found = _search(client, experiment, {"key": key}) if key else []
    if found:
        run_id: str = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return run_id
    run = client.create_run(experiment, run_name=name, tags={f"{TAG}key": key} | _revision())
    _parameters(client, run, params)
    return str(run.info.run_id)


def finish_parent(run_id: str, *, failed: bool = False, tags: Mapping[str, str] | None = None) -> str:
    """Close a parent run.

    Args:
        run_id: what `start_parent` returned.
        failed: whether the pipeline failed.
        tags: what is to be seen at a glance, the verdict above all.

    Returns:
        The address of the run in MLflow's user interface.
    """
    client, experiment = _client()
    for key, value in (tags or {}).items():
        client.set_tag(run_id, TAG + key, value)
    client.set_terminated(run_id, status="FAILED" if failed else "FINISHED")
    return address(run_id, experiment)


def address(run_id: str, experiment: str = "") -> str:
    """The address of a run in MLflow's user interface."""
    experiment = experiment or _client()[1]
    return f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def submit(output_dir: Path | str, work_root: str) -> None:
    """Send a finished stage's output, or only note it in the journal where another process sends (`SELECTMOE_DEFER`).

    Args:
        output_dir: a finished output.
        work_root: its journal takes what is not sent.
    """
    if os.environ.get(DEFER):
        _note(work_root, Path(output_dir), os.environ.get("SELECTMOE_PARENT_RUN", ""))
    else:
        publish(output_dir, journal=work_root)


def publish(output_dir: Path | str, parent_run_id: str | None = None, journal: str = "") -> str | None:
    """Send a finished stage's output to MLflow as a nested run; the same identity below the same parent only once.

    Args:
        output_dir: a finished output.
        parent_run_id: default `SELECTMOE_PARENT_RUN`; a run that KFP opened (`MLFLOW_RUN_ID`) is adopted instead.
        journal: work root in whose journal an output that could not be sent is noted.

    Returns:
        The run's id; None where there is no MLflow, or it could not be reached (said on stderr, and in the journal).
    """
    if not enabled():
        return None
    from mlflow.exceptions import (
        MlflowException,
    )  # network errors of its client are OSErrors

    parent = parent_run_id or os.environ.get("SELECTMOE_PARENT_RUN", "")
    try:
        return _publish(Path(output_dir), parent)
    except (MlflowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0][:300]
        print(
            f"MLflow could not be told about {output_dir} ({first}); the result itself is safe",
            file=sys.stderr,
        )
        if journal:
            _note(journal, Path(output_dir), parent)
            print(f"when MLflow is back: selectmoe sync {journal}", file=sys.stderr)
        return None


def _note(work_root: str, output: Path, parent: str) -> None:
    entry = {"output_dir": str(output.resolve()), "parent": parent}
    open_store(f"{work_root}/journal").put_bytes(f"{mf.digest(entry)[:24]}.json", mf.canonical_json(entry))


def sync(work_root: str) -> int:
    """Send everything that a work root's journal holds.

    Returns:
        How many outputs were sent.

    Raises:
        UserError: no MLflow is named, or one of the outputs could still not be sent.
    """
    if not enabled():
        raise UserError("MLFLOW_TRACKING_URI is not set: set it to the address of the MLflow server")
    store = open_store(f"{work_root}/journal")
    sent = 0
    for name in store.names():
        entry = json.loads(store.get(name) or b"{}")
        if not (Path(entry["output_dir"]) / mf.NAME).is_file():
            print(f"{entry['output_dir']} is gone: its entry is dropped", file=sys.stderr)
        elif publish(entry["output_dir"], entry["parent"]) is None:
            raise UserError(f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} did not take {entry['output_dir']}")
        else:
            sent += 1
        store.delete(name)
    return sent


def _client() -> tuple[MlflowClient, str]:
    """A client with short retries, and the id of our experiment (made at the first call)."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }
    for name, value in {
        **defaults,
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    wanted = os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    if wanted:
        return client, wanted
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client, client.create_experiment(name)
        except MlflowException:  # another task made it in between
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise UserError(f"MLflow's experiment {name!r} is in its bin: restore it or remove it for good")
    return client, str(found.experiment_id)


def _search(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> list[Run]:
    names = {key if key.startswith("mlflow.") else TAG + key: value for key, value in tags.items()}
    clauses = [f"tags.`{key}` = '{value}'" for key, value in names.items()]
    return list(client.search_runs([experiment], " and ".join(clauses), max_results=100))


def _publish(output: Path, parent: str) -> str:
    manifest = mf.read_manifest(output, verify=False)
    client, experiment = _client()
    same = _search(client, experiment, {"stage": manifest.stage, "identity": manifest.identity})
    adopted = os.environ.get("MLFLOW_RUN_ID", "")
    run = client.get_run(adopted) if adopted else None
    for other in same:
        if run is None and other.data.tags.get("mlflow.parentRunId", "") == parent:
            run = other
    if run is not None and run.info.run_id in {r.info.run_id for r in same if r.info.status == "FINISHED"}:
        return str(run.info.run_id)
    if run is None:
        tags = {"mlflow.parentRunId": parent} if parent else {}
        run = client.create_run(experiment, run_name=_title(manifest), tags=tags)
    run_id = str(run.info.run_id)
    for key, value in (_tags(output, manifest) | _revision()).items():
        client.set_tag(run_id, key, value)
    _parameters(client, run, manifest.config["identity"])
    _metrics(client, run_id, output, manifest)
    holder = [r for r in same if r.info.status == "FINISHED" and f"{TAG}artifacts_in" not in r.data.tags]
    if holder:
        client.set_tag(run_id, f"{TAG}artifacts_in", holder[0].info.run_id)
    else:
        _upload(client, run_id, output, manifest)
    if not adopted:
        client.set_terminated(run_id)
    return run_id


def _title(manifest: mf.Manifest) -> str:
    config = manifest.config["identity"]
    return f"{manifest.stage} {config['arm']}:{config['seed']}" if "arm" in config else manifest.stage


def _tags(output: Path, manifest: mf.Manifest) -> dict[str, str]:
    tags = {f"{TAG}{key}": str(getattr(manifest, key)) for key in ("stage", "version", "identity", "checksum")}
    tags |= {f"{TAG}input.{name}": entry["identity"] for name, entry in manifest.inputs.items()}
    if manifest.stage in BY_REFERENCE:
        tags[f"{TAG}checkpoint"] = json.dumps({"uri": str(output), "digest": manifest.identity}, sort_keys=True)
    return tags


def _revision() -> dict[str, str]:
    """The commit that this program was checked out from, where it was."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return {}
    command = [
        "git",
        "-C",
        str(here),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:  # no git on this machine
        return {}
    return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}


def _parameters(client: MlflowClient, run: Run, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flatten(params).items() if v is not None}
    fresh = [Param(k, v[:PARAMETER_LENGTH]) for k, v in flat.items() if k not in run.data.params]
    for at in range(0, len(fresh), 100):
        client.log_batch(run.info.run_id, params=fresh[at : at + 100])


def _metrics(client: MlflowClient, run_id: str, output: Path, manifest: mf.Manifest) -> None:
    from mlflow.entities import Metric

    created = 0
    metrics = []
    if (output / METRICS).is_file():
        for line in (output / METRICS).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            created = int(entry["time"] * 1000)
            name = re.sub(r"[^\w./ :-]", "_", entry["name"])
            metrics.append(Metric(name, entry["value"], created, entry.get("step", 0)))
    summary = {
        "seconds": manifest.environment["seconds"],
        "peak_rss_bytes": manifest.environment["peak_rss_bytes"],
    }
    summary |= {"rows_in": manifest.rows["in"], "rows_out": manifest.rows["out"]}
    metrics += [Metric(f"stage/{name}", float(value), created, 0) for name, value in summary.items()]
    for at in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[at : at + 1000])


def _upload(client: MlflowClient, run_id: str, output: Path, manifest: mf.Manifest) -> None:
    present = set(_listed(client, run_id, ""))
    for path in _uploads(output, manifest):
        name = path.relative_to(output).as_posix()
        if name not in present:
            folder = path.relative_to(output).parent.as_posix()
            client.log_artifact(run_id, str(path), None if folder == "." else folder)


def _uploads(output: Path, manifest: mf.Manifest) -> list[Path]:
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


def _listed(client: MlflowClient, run_id: str, folder: str) -> Iterator[str]:
    for info in client.list_artifacts(run_id, folder or None):
        if info.is_dir:
            yield from _listed(client, run_id, info.path)
        else:
            yield info.path
