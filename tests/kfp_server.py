"""A stand-in for the API server of Kubeflow Pipelines (no cluster here): its v2beta1 protocol over HTTP, nothing behind it.

What comes in and what goes out are the models of kfp-server-api: a body with a field that the model does not have is
answered with 400, as the real server does, and an uploaded pipeline must parse as KFP's protobuf. A run executes nothing:
each time it is asked for it moves on to the next state of `script`. `faults` makes the next answers go wrong.
"""

from __future__ import annotations

import email
import json
import re
import threading
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

State = tuple[str, Sequence[api.V2beta1PipelineTaskDetail]]
CLIENT = api.ApiClient()


class Answer(Exception):
    """An answer that is not 200: a status and the server's words."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


def node(name: str, state: str, message: str = "", pod: str = "", children: Sequence[str] = ()) -> Any:
    """A node of a run's workflow as the server lists it; the message stands in its history of states."""
    error = api.GoogleRpcStatus(code=2, message=message) if message else None
    return api.V2beta1PipelineTaskDetail(
        task_id=str(uuid.uuid4()),
        display_name=name,
        state=state,
        pod_name=pod or None,
        state_history=[api.V2beta1RuntimeStatus(state=state, error=error)],
        child_tasks=[api.PipelineTaskDetailChildTask(pod_name=child) for child in children] or None,
    )


class KfpServer:
    """The stand-in, on a free port of this machine, in a thread; a context manager."""

    def __init__(self, token: str = "", namespaces: Sequence[str] = ()):
        self.token = token
        """The bearer token that every call must bring; empty: none."""
        self.namespaces = tuple(namespaces)
        """What the user may use; empty: a server without namespaces."""
        self.script: list[State] = [("PENDING", []), ("RUNNING", [node("check", "RUNNING")]), ("SUCCEEDED", [])]
        self.faults: list[tuple[str, int | str]] = []
        """(METHOD /path-pattern, what): a status, `drop` (connection cut), `lose` (done, then cut), `html`, `login`."""
        self.calls: list[str] = []
        self.experiments = [api.V2beta1Experiment(experiment_id=_id(), display_name="Default", namespace=self._home())]
        self.pipelines: list[Any] = []
        self.versions: list[Any] = []
        self.runs: list[Any] = []
        self._at: dict[str, int] = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> KfpServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _home(self) -> str | None:
        return self.namespaces[0] if self.namespaces else None

    def fault(self, call: str) -> int | str | None:
        """The fault that the next call runs into, used up by it."""
        for n, (pattern, what) in enumerate(self.faults):
            if re.search(pattern, call):
                del self.faults[n]
                return what
        return None

    def answer(self, call: str, query: dict[str, str], body: bytes, headers: Any) -> Any:
        """The model that answers a call."""
        with self._lock:
            if self.token and headers.get("Authorization") != f"Bearer {self.token}":
                raise Answer(401, "Unauthenticated")
            if call.endswith("/healthz"):
                return api.V2beta1GetHealthzResponse(multi_user=bool(self.namespaces))
            routes = {
                r"GET /experiments": self._list_experiments,
                r"POST /experiments": self._create_experiment,
                r"GET /pipelines": self._list_pipelines,
                r"POST /pipelines": self._create_pipeline,
                r"POST /pipelines/upload_version": self._upload_version,
                r"GET /pipelines/([^/]+)/versions": self._list_versions,
                r"GET /pipelines/([^/]+)/versions/([^/]+)": self._get_version,
                r"GET /runs": self._list_runs,
                r"POST /runs": self._create_run,
                r"GET /runs/([^/]+)": self._get_run,
                r"DELETE /runs/([^/]+)": self._delete_run,
            }
            for pattern, handle in routes.items():
                found = re.fullmatch(pattern, call)
                if found:
                    return handle(*found.groups(), query=query, body=body, headers=headers)
        raise Answer(404, f"Not Found: {call}")

    def _allowed(self, namespace: str | None) -> None:
        if self.namespaces and namespace not in self.namespaces:
            raise Answer(403, f"User is not authorized in namespace {namespace!r}")
        if not self.namespaces and namespace:
            raise Answer(400, "In single-user mode, the namespace must be empty")

    def _list_experiments(self, query: dict[str, str], **_: Any) -> Any:
        self._allowed(query.get("namespace"))
        return api.V2beta1ListExperimentsResponse(experiments=_filtered(self.experiments, query) or None)

    def _create_experiment(self, body: bytes, **_: Any) -> Any:
        made = _read(body, "V2beta1Experiment")
        self._allowed(made.namespace)
        if any(item.display_name == made.display_name for item in self.experiments):
            raise Answer(409, f"experiment {made.display_name} already exists")
        made.experiment_id = _id()
        self.experiments.append(made)
        return made

    def _list_pipelines(self, query: dict[str, str], **_: Any) -> Any:
        self._allowed(query.get("namespace"))
        return api.V2beta1ListPipelinesResponse(pipelines=_filtered(self.pipelines, query) or None)

    def _create_pipeline(self, body: bytes, **_: Any) -> Any:
        made = _read(body, "V2beta1Pipeline")
        self._allowed(made.namespace)
        if any(item.name == made.name for item in self.pipelines):
            raise Answer(409, f"pipeline {made.name} already exists")
        made.pipeline_id = _id()
        self.pipelines.append(made)
        return made

    def _upload_version(self, query: dict[str, str], body: bytes, headers: Any) -> Any:
        home = query.get("pipelineid", "")
        if not any(item.pipeline_id == home for item in self.pipelines):
            raise Answer(400, "Failed to create a pipeline version")
        if any(item.name == query["name"] and item.pipeline_id == home for item in self.versions):
            raise Answer(409, "Failed to create a pipeline version")
        made = api.V2beta1PipelineVersion(
            pipeline_id=home,
            pipeline_version_id=_id(),
            name=query["name"],
            display_name=query.get("display_name") or query["name"],
            pipeline_spec=_pipeline(body, headers),
        )
        self.versions.append(made)
        return made

    def _list_versions(self, home: str, query: dict[str, str], **_: Any) -> Any:
        listed = _filtered([item for item in self.versions if item.pipeline_id == home], query)
        return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=listed or None)

    def _get_version(self, home: str, version: str, **_: Any) -> Any:
        return _one(self.versions, "pipeline_version_id", version)

    def _list_runs(self, query: dict[str, str], **_: Any) -> Any:
        self._allowed(query.get("namespace"))
        listed = [run for run in self.runs if run.experiment_id == query.get("experiment_id")]
        return api.V2beta1ListRunsResponse(runs=_filtered(listed, query) or None)

    def _create_run(self, body: bytes, **_: Any) -> Any:
        made = _read(body, "V2beta1Run")
        _one(self.experiments, "experiment_id", made.experiment_id)
        reference = made.pipeline_version_reference
        version = _one(self.versions, "pipeline_version_id", reference.pipeline_version_id)
        spec = version.pipeline_spec.get("pipeline_spec", version.pipeline_spec)
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        unknown = set(made.runtime_config.parameters or {}) - set(known)
        if unknown:
            raise Answer(400, f"parameter {sorted(unknown)} is not in the pipeline")
        made.run_id, made.state, made.created_at = _id(), "PENDING", datetime.now(UTC).replace(microsecond=0)
        self.runs.append(made)
        return made

    def _get_run(self, run_id: str, **_: Any) -> Any:
        run = _one(self.runs, "run_id", run_id)
        step = self._at.get(run_id, 0)
        self._at[run_id] = step + 1
        run.state, details = self.script[min(step, len(self.script) - 1)]
        run.run_details = api.V2beta1RunDetails(task_details=list(details))
        return run

    def _delete_run(self, run_id: str, **_: Any) -> Any:
        self.runs.remove(_one(self.runs, "run_id", run_id))
        return {}


def _id() -> str:
    return str(uuid.uuid4())


def _one(items: Sequence[Any], key: str, value: str) -> Any:
    found = [item for item in items if getattr(item, key) == value]
    if not found:
        raise Answer(404, f"{key} {value} not found")
    return found[0]


def _filtered(items: Sequence[Any], query: dict[str, str]) -> list[Any]:
    """The items that a `V2beta1Filter` of equalities lets through."""
    if "filter" not in query:
        return list(items)
    predicates = _read(query["filter"].encode(), "V2beta1Filter").predicates
    assert all(predicate.operation == "EQUALS" for predicate in predicates)
    return [item for item in items if all(getattr(item, p.key) == p.string_value for p in predicates)]


def _read(body: bytes, model: str) -> Any:
    """A body as a model of kfp-server-api; a field that the model does not have is an error."""
    data = json.loads(body)
    _known_fields(data, model)
    return CLIENT.deserialize(type("Response", (), {"data": body})(), model)


def _known_fields(data: Any, model: str) -> None:
    inner = re.fullmatch(r"list\[(.*)\]", model)
    if inner:
        for item in data:
            _known_fields(item, inner[1])
    cls = getattr(api, model, None)
    if cls is None or not cls.openapi_types:
        return
    for key, value in data.items():
        names = [name for name, wire in cls.attribute_map.items() if wire == key]
        if not names:
            raise Answer(400, f"unknown field {key!r} in {model}")
        _known_fields(value, cls.openapi_types[names[0]])


def _pipeline(body: bytes, headers: Any) -> dict[str, Any]:
    """The pipeline of a multipart upload, as the server keeps it."""
    whole = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body
    parts = email.message_from_bytes(whole).get_payload()
    part = next(p for p in parts if p.get_param("name", header="content-disposition") == "uploadfile")  # type: ignore
    documents = list(yaml.safe_load_all(part.get_payload(decode=True)))  # type: ignore
    try:
        json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        for platform in documents[1:]:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        raise Answer(400, f"Failed to read a pipeline spec file: {error}") from error
    return {"pipeline_spec": documents[0], "platform_spec": documents[1]} if documents[1:] else documents[0]


def _handler(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def _serve(self) -> None:
            url = urlsplit(self.path)
            call = f"{self.command} {url.path.removeprefix('/apis/v2beta1')}"
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.calls.append(call)
            fault = server.fault(call)
            if fault == "drop":
                self.close_connection = True
                return
            if fault == "html":
                self._send(200, b"<html>", "text/html")
                return
            if fault == "login":
                self._send(302, b"", "text/html")
                return
            if isinstance(fault, int):
                self._send(fault, json.dumps({"message": f"fault {fault}"}).encode())
                return
            try:
                model = server.answer(call, query, body, self.headers)
                status, reply = 200, CLIENT.sanitize_for_serialization(model)
            except Answer as other:
                status, reply = other.status, {"message": other.message}
            if fault == "lose":
                self.close_connection = True
                return
            self._send(status, json.dumps(reply).encode())

        def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "/login")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
