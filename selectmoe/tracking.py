"""MLflow: one run per pipeline, a nested run per stage. The only module that imports mlflow.

No command runs this module: `selectmoe/sending.py` takes what the journal holds and has it delivered. Nothing is
logged twice: a run is found again by its tags, and the points that it already has are read back before more are sent.
What a person wants to browse (trained weights, adapters, router data, selections, the report) is uploaded once; pools
and base and converted checkpoints are there by reference.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import journal
from selectmoe import manifest as mf
from selectmoe.config import flatten
from selectmoe.errors import UserError
from selectmoe.journal import TAG
from selectmoe.storage import open_store
from selectmoe.uploads import BY_REFERENCE, SHARD, numbers, tags_of, title, uploads

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "select-moe"
DATASETS = {"pool": "pool", "router_data": "router data", "rows": "selection", "holdout": "holdout"}
"""Inputs that MLflow lists as a run's datasets, and what they are."""
MODELS = {"warmup": "select-moe-router", "finetune": "select-moe-adapter"}
"""Registered models; of the fine-tunings, only the arm `selected` is registered."""
BATCH = 500
PROVE_SECONDS = 20.0
"""How long `prove` tries an MLflow again that does not answer."""
PARAMETER_LENGTH = 6000
"""What MLflow stores of one parameter at most."""


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
    with _settings({"MLFLOW_TRACKING_URI": uri, **impatient, **named}):
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


def expire(uri: str, before: int) -> int:
    """Delete old runs of ours that have ended, unless something that stays rests on them; MLflow keeps them in its bin.

    What stays keeps alive the run that holds its artifacts and its parents; so does a version of a registered model.

    Args:
        uri: address of the MLflow server.
        before: a run is old that began before this (milliseconds since 1970).

    Returns:
        How many were deleted.
    """
    with _settings({"MLFLOW_TRACKING_URI": uri}):
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        experiments = [entry.experiment_id for entry in _pages(client.search_experiments)]
        runs = {run.info.run_id: run for run in _pages(client.search_runs, experiments)} if experiments else {}
        old = {run_id for run_id, run in runs.items() if _ended_before(run, before)}
        kept = [run_id for run_id in runs if run_id not in old]
        kept += [version.run_id for version in _pages(client.search_model_versions)]
        while kept:
            run_id = kept.pop()
            old.discard(run_id)
            tags = runs[run_id].data.tags if run_id in runs else {}
            kept += [tags[key] for key in ("mlflow.parentRunId", f"{TAG}artifacts_in") if tags.get(key) in old]
        for run_id in sorted(old):
            client.delete_run(run_id)
        return len(old)


def _ended_before(run: Run, before: int) -> bool:
    ours = any(key.startswith(TAG) for key in run.data.tags)
    return ours and run.info.status in ("FINISHED", "FAILED", "KILLED") and run.info.start_time < before


def _pages(search: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Everything that a search of MLflow's client finds."""
    token = None
    while True:
        page = search(*arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][-200:]


@contextmanager
def _settings(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; MLflow's clients read them at every request."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def address(parent: str) -> str:
    """The address of a parent run in MLflow's user interface; empty where MLflow does not know it (yet)."""
    from mlflow.exceptions import MlflowException

    try:
        client, experiment = _client()
        found = _search(client, experiment, {"key": parent.removeprefix("key:")})
    except (MlflowException, OSError):  # it is away: the caller says where the journal is
        return ""
    uri = os.environ["MLFLOW_TRACKING_URI"].rstrip("/")
    return f"{uri}/#/experiments/{experiment}/runs/{found[0].info.run_id}" if found else ""


class Delivery:
    """Takes the files of a journal to MLflow; remembers how far it is, and which points a run already has."""

    def __init__(self, work_root: str, writer: str = "") -> None:
        self.work_root = work_root
        self.writer = writer
        self.offsets: dict[str, int] = {}
        self.heads: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, str] = {}
        self.points: dict[str, set[tuple[str, int]]] = {}

    def send(self) -> tuple[int, str]:
        """Send what there is, and take away what was sent.

        Returns:
            The number of outputs sent, and why something could not be sent (empty: everything was).
        """
        outputs, failure = 0, ""
        with _alone(self.work_root):
            for name in journal.names(self.work_root, self.writer):
                records, end = journal.read(self.work_root, name, self.offsets.get(name, 0))
                try:
                    if records:
                        outputs += self._file(records, name)
                except Exception as error:  # MLflow's, requests' and the artifact stores' own kinds
                    self.runs.clear()  # what MLflow has of the batch is unknown: read back before the next attempt
                    self.points.clear()
                    failure = _first_line(error)
                    if _away(error):
                        break
                    continue
                self.offsets[name] = end
                if journal.remove(self.work_root, name, end):
                    self.offsets.pop(name)
                    self.heads.pop(name, None)
        return outputs, failure

    def _file(self, records: list[dict[str, Any]], name: str) -> int:
        if records[0]["do"] in ("metric", "stage_end"):  # the rest of a file that grows: its head says whose it is
            records = [self.heads[name], *records]
        self.heads[name] = records[0]
        client, experiment = _client()
        first = records[0]
        if first["do"] == "parent":
            self._parent(client, experiment, first)
        elif first["do"] == "parent_end":
            run_id = self._reference(client, experiment, first["parent"])
            for key, value in first["tags"].items():
                client.set_tag(run_id, TAG + key, value)
            client.set_terminated(run_id, status=first["status"])
        elif first["do"] == "output":
            return self._output(client, experiment, first)
        else:
            self._stage(client, experiment, records)
        return 0

    def _parent(self, client: MlflowClient, experiment: str, record: Mapping[str, Any]) -> None:
        found = _search(client, experiment, {"key": record["key"]})
        tags = {f"{TAG}key": record["key"]} | record["tags"]
        run = found[0] if found else client.create_run(experiment, record["ms"], tags, record["name"])
        client.update_run(run.info.run_id, status="RUNNING", name=record["name"])
        _parameters(client, run, record["params"])

    def _reference(self, client: MlflowClient, experiment: str, parent: str) -> str:
        """The id of the run that a reference names; made where a key has none yet."""
        if not parent.startswith("key:"):
            return parent
        if parent not in self.runs:
            key = parent.removeprefix("key:")
            found = _search(client, experiment, {"key": key})
            run = found[0] if found else client.create_run(experiment, tags={f"{TAG}key": key}, run_name=key)
            self.runs[parent] = str(run.info.run_id)
        return self.runs[parent]

    def _run(self, client: MlflowClient, experiment: str, record: Mapping[str, Any], name: str) -> Run:
        """The run of a stage's work: KFP's, the one that it had before, or a new one."""
        if record["adopt"]:
            return client.get_run(record["adopt"])
        parent = self._reference(client, experiment, record["parent"])
        for found in _search(client, experiment, {"work": record["tags"][f"{TAG}work"]}):
            if found.data.tags.get("mlflow.parentRunId", "") == parent:
                return found
        below = {"mlflow.parentRunId": parent} if parent else {}
        return client.create_run(experiment, record.get("ms"), record["tags"] | below, name)

    def _stage(self, client: MlflowClient, experiment: str, records: list[dict[str, Any]]) -> None:
        head = records[0]
        key = f"{head['parent']} {head['adopt']} {head['key']}"
        if key not in self.runs:
            run = self._run(client, experiment, head, title(head["stage"], head["params"]))
            _tag(client, run, head["tags"])
            _parameters(client, run, head["params"])
            if run.info.status not in ("RUNNING", "FINISHED"):
                client.update_run(run.info.run_id, status="RUNNING")
            self.runs[key] = str(run.info.run_id)
        run_id = self.runs[key]
        self._metrics(client, run_id, [r for r in records if r["do"] == "metric"])
        for end in (r for r in records if r["do"] == "stage_end"):
            for tag, value in {**end["tags"], f"{TAG}failure": end["message"]}.items():
                client.set_tag(run_id, tag, value)
            if not head["adopt"]:  # KFP closes its own
                client.set_terminated(run_id, end["status"], end["ms"])
            self.runs.pop(key, None)  # should the work begin again, the run is opened again

    def _metrics(self, client: MlflowClient, run_id: str, records: list[dict[str, Any]]) -> None:
        """Send the points that a run does not have, in batches; a point is a name and a step."""
        from mlflow.entities import Metric

        if run_id not in self.points:
            names = client.get_run(run_id).data.metrics
            self.points[run_id] = {(n, m.step) for n in names for m in client.get_metric_history(run_id, n)}
        has = self.points[run_id]
        fresh: dict[tuple[str, int], Metric] = {}
        for r in records:
            name = re.sub(r"[^\w./ :-]", "_", r["name"])
            if (name, r["step"]) not in has:
                fresh.setdefault((name, r["step"]), Metric(name, r["value"], r["ms"], r["step"]))
        points = list(fresh.items())
        for at in range(0, len(points), BATCH):
            client.log_batch(run_id, metrics=[metric for _, metric in points[at : at + BATCH]])
            has |= {point for point, _ in points[at : at + BATCH]}

    def _output(self, client: MlflowClient, experiment: str, record: dict[str, Any]) -> int:
        """A finished output: everything about it that MLflow does not have."""
        with _files(self.work_root, record) as output:
            if output is None:
                print(f"{record['output_dir']} is gone: its entry is dropped", file=sys.stderr)
                return 0
            manifest = mf.read_manifest(output, verify=False)
            record["tags"] = tags_of(record["output_dir"], manifest) | record["tags"]
            run = self._run(client, experiment, record, title(manifest.stage, manifest.config["identity"]))
            if run.info.status == "FINISHED" and f"{TAG}sent" in run.data.tags:
                return 1
            run_id = str(run.info.run_id)
            _tag(client, run, record["tags"])
            _parameters(client, run, manifest.config["identity"])
            self._metrics(client, run_id, numbers(output, manifest))
            _inputs(client, run, manifest)
            same = _search(client, experiment, {"stage": manifest.stage, "identity": manifest.identity, "sent": "all"})
            holder = same[0] if same else run
            if holder is run:
                _upload(client, run_id, output, manifest)
            else:
                client.set_tag(run_id, f"{TAG}artifacts_in", holder.info.run_id)
            _register(client, holder, output, manifest)
            client.set_tag(run_id, f"{TAG}sent", "all" if holder is run else "by reference")
            if not record["adopt"]:
                client.set_terminated(run_id)
        return 1


@contextmanager
def _alone(work_root: str) -> Iterator[None]:
    """One sender at a time per folder; on an object store every sender takes only its own process's files."""
    if "://" in work_root:
        yield
        return
    Path(work_root).mkdir(parents=True, exist_ok=True)
    with open(Path(work_root, "journal.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _away(error: Exception) -> bool:
    """Whether other files would fare no better: it does not answer, answers 5xx, or refuses us."""
    ask = getattr(error, "get_http_status_code", None)
    status = ask() if ask else getattr(getattr(error, "response", None), "status_code", 0)
    return not status or status >= 500 or status in (401, 403, 408, 429)


@contextmanager
def _files(work_root: str, record: Mapping[str, Any]) -> Iterator[Path | None]:
    """The folder of an output: where it was made, or what was kept of it; None where it is gone."""
    here = Path(record["output_dir"])
    if (here / mf.NAME).is_file():
        yield here
    elif "kept" not in record:
        yield None
    else:
        store = open_store(f"{journal.place(work_root)}/{record['kept']}")
        with tempfile.TemporaryDirectory() as folder:
            for name in store.names():
                store.fetch(name, Path(folder, name))
            yield Path(folder)
        store.clear()


def _client() -> tuple[MlflowClient, str]:
    """A client with short retries, and the id of our experiment (made at the first call)."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }
    for name, value in {
        **defaults,
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a command's last line there is what it wrote
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


def _tag(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    fresh = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    if fresh:
        client.log_batch(run.info.run_id, tags=fresh)


def _parameters(client: MlflowClient, run: Run, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flatten(params).items() if v is not None}
    fresh = [Param(k, v[:PARAMETER_LENGTH]) for k, v in flat.items() if k not in run.data.params]
    for at in range(0, len(fresh), 100):
        client.log_batch(run.info.run_id, params=fresh[at : at + 100])


def _inputs(client: MlflowClient, run: Run, manifest: mf.Manifest) -> None:
    """List pool, router data, selection and holdout as the run's datasets: digest and source."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    has = {entry.dataset.name for entry in run.inputs.dataset_inputs}
    found = []
    for name, kind in DATASETS.items():
        if (entry := manifest.inputs.get(name)) and kind not in has:
            source = json.dumps({"uri": entry["uri"], "identity": entry["identity"]}, sort_keys=True)
            dataset = Dataset(kind, entry["identity"][:36], "local" if "://" not in entry["uri"] else "s3", source)
            found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
    if found:
        client.log_inputs(run.info.run_id, found)


def _register(client: MlflowClient, holder: Run, output: Path, manifest: mf.Manifest) -> None:
    """A version of a registered model for trained weights; after a verdict *beats random*, the champions."""
    from mlflow.exceptions import MlflowException

    if manifest.stage == "report":
        _champions(client, output)
    name = MODELS.get(manifest.stage, "")
    if not name or manifest.config["identity"].get("arm", "selected") != "selected":
        return
    with suppress(MlflowException):  # it exists; what else is wrong is said by the next call
        client.create_registered_model(name)
    version = _version(client, name, manifest.identity)
    if not version:
        tags = {"identity": manifest.identity, "seed": str(manifest.config["identity"].get("seed", ""))}
        source, run = holder.info.artifact_uri, holder.info.run_id
        version = str(client.create_model_version(name, source, run, tags, await_creation_for=0).version)
    if int(version) > int(client.get_registered_model(name).aliases.get("candidate", 0)):
        client.set_registered_model_alias(name, "candidate", version)


def _version(client: MlflowClient, name: str, identity: str) -> str:
    found = client.search_model_versions(f"name = '{name}' and tags.identity = '{identity}'")
    return str(found[0].version) if found else ""


def _champions(client: MlflowClient, report: Path) -> None:
    """Give the versions that a report with the verdict *beats random* rests on the alias; of the seeds, the first."""
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    if results["verdict"]["verdict"] != "beats_random":
        return
    for stage, name in MODELS.items():
        rests_on = [s for s in results["stages"] if s["stage"] == stage and s["arm"] in ("", "selected")]
        for entry in sorted(rests_on, key=lambda s: str(s["seed"])):
            if version := _version(client, name, entry["identity"]):
                client.set_registered_model_alias(name, "champion", version)
                break


def _upload(client: MlflowClient, run_id: str, output: Path, manifest: mf.Manifest) -> None:
    from selectmoe.previews import previews

    present = set(_listed(client, run_id, ""))
    for path in uploads(output, manifest):
        name = path.relative_to(output).as_posix()
        if name not in present:
            folder = path.relative_to(output).parent.as_posix()
            client.log_artifact(run_id, str(path), None if folder == "." else folder)
    if manifest.stage in BY_REFERENCE or manifest.stage.startswith(SHARD):
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in previews(output, Path(folder)):
            name = f"previews/{path.relative_to(folder).as_posix()}"
            if name not in present:
                client.log_artifact(run_id, str(path), os.path.dirname(name))


def _listed(client: MlflowClient, run_id: str, folder: str) -> Iterator[str]:
    for info in client.list_artifacts(run_id, folder or None):
        if info.is_dir:
            yield from _listed(client, run_id, info.path)
        else:
            yield info.path
