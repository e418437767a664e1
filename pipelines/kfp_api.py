"""The API server of Kubeflow Pipelines, v2beta1, through its own client package (kfp-server-api): `python -m pipelines submit`.

`kfp.Client` is not used for the calls because it gives them no timeout, tries a refused token five times, writes a file
into the home folder (pods are read-only) and takes a cancelled run for one that still runs. What is added here: a time
limit on every call, retries with back-off while the server is away or answers 429 or 5xx, and errors that say what to do.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from selectmoe.errors import UserError

TIMEOUT = (5, 60)
"""Seconds to connect, seconds to wait for an answer."""
DELAYS = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before each further attempt; a run that is followed is asked for at the last of them for ever."""
TICK = 1.5
"""Longer than the second in which the server counts."""
ENDPOINT = "KF_PIPELINES_ENDPOINT"
TOKEN = "KF_PIPELINES_TOKEN"
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Unavailable(Exception):
    """The server does not answer, or answers 5xx, after all attempts: exit code 1."""


class Conflict(Exception):
    """What was to be made is there already (409)."""


class Server:
    """One API server and the namespace that we work in.

    Args:
        endpoint: its URL; empty: `KF_PIPELINES_ENDPOINT`, then the service of a cluster whose pod this is.
        namespace: the user's namespace where the server has several; empty: the pod's own.
        token_file: file with a bearer token, read again for every call; empty: `KF_PIPELINES_TOKEN`, then the projected
            service account token of a pod (`KF_PIPELINES_SA_TOKEN_PATH`, or where Kubeflow puts it).
        ca_file: certificates that vouch for the server; empty: the public ones.

    Raises:
        UserError: no endpoint, no readable token file, or something else than Kubeflow Pipelines answers.
        Unavailable: nothing answers.
    """

    def __init__(self, endpoint: str = "", namespace: str = "", token_file: str = "", ca_file: str = "") -> None:
        import kfp_server_api as api

        self.endpoint = find_endpoint(endpoint)
        self._api = api
        self._client = api.ApiClient(_configuration(api, self.endpoint, token_file, ca_file))
        self._experiments = api.ExperimentServiceApi(self._client)
        self._pipelines = api.PipelineServiceApi(self._client)
        self._uploads = api.PipelineUploadServiceApi(self._client)
        self._runs = api.RunServiceApi(self._client)
        health = self._call(api.HealthzServiceApi(self._client).healthz_service_get_healthz)
        if "json" not in (self._client.last_response.getheader("content-type") or ""):
            raise UserError(f"{self.endpoint} is no Kubeflow Pipelines API: it answers something else than JSON")
        self.namespace = _namespace(namespace, bool(health.multi_user))

    def experiment(self, name: str, create: bool) -> str:
        """The ID of an experiment.

        Args:
            name: its name.
            create: make it where there is none.

        Raises:
            UserError: there is none, and none is to be made.
        """
        service, model = self._experiments, self._api.V2beta1Experiment

        def find() -> str | None:
            found = self._call(service.experiment_service_list_experiments, **self._named(name)).experiments or []
            return next((str(item.experiment_id) for item in found if item.display_name == name), None)

        known = find()
        if known is None and not create:
            raise UserError(f"there is no experiment {name!r} {self._where()}: create_experiment=true makes it")
        if known is None:
            wanted = model(display_name=name, namespace=self.namespace)
            made = self._make(find, service.experiment_service_create_experiment, wanted)
            known = made if isinstance(made, str) else str(made.experiment_id)
        return known

    def version(self, pipeline: str, version: str, package: Path) -> tuple[str, str, bool]:
        """Find or upload a version of a pipeline.

        Args:
            pipeline: name of the pipeline; made where there is none.
            version: name of the version, which says what is in it: the same name is the same content.
            package: the compiled pipeline.

        Returns:
            ID of the pipeline, ID of the version, whether it was uploaded now.
        """
        service, model = self._pipelines, self._api.V2beta1Pipeline

        def find_pipeline() -> str | None:
            found = self._call(service.pipeline_service_list_pipelines, **self._named(pipeline)).pipelines or []
            return next((str(item.pipeline_id) for item in found if item.display_name == pipeline), None)

        home = find_pipeline()
        if home is None:
            wanted = model(name=pipeline, display_name=pipeline, namespace=self.namespace)
            made = self._make(find_pipeline, service.pipeline_service_create_pipeline, wanted)
            home = made if isinstance(made, str) else str(made.pipeline_id)

        def find_version() -> str | None:
            listing = service.pipeline_service_list_pipeline_versions
            listed = self._call(listing, home, filter=self._filter(version)).pipeline_versions or []
            return next((str(item.pipeline_version_id) for item in listed if item.display_name == version), None)

        known = find_version()
        if known is not None:
            return home, known, False
        upload = self._uploads.upload_pipeline_version
        made = self._make(find_version, upload, str(package), name=version, pipelineid=home)
        return (home, made, False) if isinstance(made, str) else (home, str(made.pipeline_version_id), True)

    def pipelines(self) -> int:
        """How many pipelines we may see: the server accepts our token."""
        known: dict[str, Any] = {"namespace": self.namespace} if self.namespace else {}
        listed = self._call(self._pipelines.pipeline_service_list_pipelines, page_size=1, **known)
        return int(listed.total_size or len(listed.pipelines or []))

    def start(self, run: Any) -> str:
        """Start a run, once: an attempt whose answer was lost is looked for before the next one.

        Args:
            run: a `V2beta1Run`.

        Returns:
            Its ID.
        """
        before = {*self._runs_like(run)}

        def fresh() -> str | None:
            return next((known for known in self._runs_like(run) if known not in before), None)

        made = self._call(self._runs.run_service_create_run, run, recover=fresh)
        return made if isinstance(made, str) else str(made.run_id)

    def only(self, run: Any) -> str:
        """Start a run unless its experiment has one of that name.

        The server lets several runs have one name. Of those that are started at the same time the oldest stays: whoever
        started another deletes it. The server's times are whole seconds, so it is looked only after the next has begun.

        Args:
            run: a `V2beta1Run` with a name.

        Returns:
            The ID of the run of that name.
        """
        for known in self._runs_like(run):
            return known
        made = self.start(run)
        time.sleep(TICK)
        oldest = next(iter(self._runs_like(run)), made)
        if oldest != made:
            self._call(self._runs.run_service_delete_run, made)
        return oldest

    def _runs_like(self, run: Any) -> list[str]:
        """IDs of the experiment's runs of the same name, the oldest first."""
        where = {"experiment_id": run.experiment_id, **self._named(run.display_name)}
        listed = self._call(self._runs.run_service_list_runs, **where).runs or []
        same = [item for item in listed if item.display_name == run.display_name]
        return [str(item.run_id) for item in sorted(same, key=lambda item: (item.created_at, item.run_id))]

    def run(self, run_id: str, patient: bool = False) -> Any:
        """A run as it is now (`V2beta1Run`); `patient`: ask until there is an answer."""
        return self._call(self._runs.run_service_get_run, run_id, patient=patient)

    def spec(self, run: Any) -> dict[str, Any]:
        """The compiled pipeline of a run (asked for until there is an answer); empty where the server does not keep it."""
        spec, reference = run.pipeline_spec, run.pipeline_version_reference
        if not spec and reference is not None:
            get = self._pipelines.pipeline_service_get_pipeline_version
            spec = self._call(get, reference.pipeline_id, reference.pipeline_version_id, patient=True).pipeline_spec
        spec = spec or {}
        return dict(spec.get("pipeline_spec", spec))

    def link(self, run_id: str) -> str:
        """Where a person sees a run (`KF_PIPELINES_UI_ENDPOINT`, else the endpoint)."""
        return f"{os.environ.get('KF_PIPELINES_UI_ENDPOINT', self.endpoint).rstrip('/')}/#/runs/details/{run_id}"

    def _filter(self, name: str) -> str:
        api = self._api
        equals = api.V2beta1Predicate(
            operation=api.V2beta1PredicateOperation.EQUALS, key="display_name", string_value=name
        )
        return json.dumps(self._client.sanitize_for_serialization(api.V2beta1Filter(predicates=[equals])))

    def _named(self, name: str) -> dict[str, Any]:
        return {"filter": self._filter(name), **({"namespace": self.namespace} if self.namespace else {})}

    def _where(self) -> str:
        return f"in namespace {self.namespace}" if self.namespace else f"at {self.endpoint}"

    def _make(self, find: Callable[[], str | None], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make something by its name; somebody else may have made it meanwhile, which is as good."""
        try:
            return self._call(method, *args, **kwargs)
        except Conflict as conflict:
            found = find()
            if found is None:
                raise UserError(f"{conflict}: the name is taken where you may not see it") from None
            return found

    def _call(
        self,
        method: Callable[..., Any],
        *args: Any,
        recover: Callable[[], Any] = lambda: None,
        patient: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Call the server until it answers; `recover` may find what a lost answer made before it is asked again."""
        from urllib3.exceptions import HTTPError

        attempt = 0
        while True:
            try:
                return method(*args, _request_timeout=TIMEOUT, **kwargs)
            except (HTTPError, OSError, self._api.ApiException) as error:
                reason = self._passing(error)
            if attempt >= len(DELAYS) and not patient:
                raise Unavailable(f"{self.endpoint}: {reason}, {attempt + 1} times in a row")
            delay = DELAYS[min(attempt, len(DELAYS) - 1)]
            attempt += 1
            print(f"{self.endpoint}: {reason}; trying again in {delay:.0f} s", file=sys.stderr)
            time.sleep(delay * random.uniform(0.8, 1.2))
            made = recover()
            if made is not None:
                return made

    def _passing(self, error: Exception) -> str:
        """What is wrong for a while; anything else is raised with what would mend it."""
        if not isinstance(error, self._api.ApiException):
            return "no answer (" + type(error).__name__ + ")"
        status, said = error.status or 0, _said(error)
        if status == 429 or status >= 500:
            return f"answer {status}{said}"
        if status == 409:
            raise Conflict(f"{self.endpoint} answers 409{said}") from None
        if status == 0:
            raise UserError(f"{self.endpoint}: its certificate is not trusted{said}; ca_file=FILE names whom to trust")
        if status == 401 or 300 <= status < 400:
            raise UserError(
                f"{self.endpoint} wants to know who you are (answer {status}): set {TOKEN} or token_file=FILE to a valid token"
            ) from None
        if status == 403:
            raise UserError(f"you may not do that {self._where_asked()} (answer 403){said}") from None
        raise UserError(f"{self.endpoint} refuses (answer {status}){said}") from None

    def _where_asked(self) -> str:
        return self._where() if hasattr(self, "namespace") else f"at {self.endpoint}"


def find_endpoint(endpoint: str) -> str:
    """The URL of the API server.

    Args:
        endpoint: what the user says; empty: the environment, or the cluster that this is a pod of.

    Raises:
        UserError: nothing says where it is, or it is no http(s) URL.
    """
    found = endpoint or os.environ.get(ENDPOINT, "")
    if not found and os.environ.get("KUBERNETES_SERVICE_HOST"):
        found = IN_CLUSTER
    if not found:
        raise UserError(f"endpoint= (or {ENDPOINT}) is needed outside a cluster: the URL of Kubeflow Pipelines")
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", found):
        raise UserError("endpoint= takes http://HOST or https://HOST, without user and password")
    return found.rstrip("/")


def _configuration(api: Any, endpoint: str, token_file: str, ca_file: str) -> Any:
    configuration = api.Configuration(host=endpoint)
    configuration.retries = False  # a redirect is a login page, and `_call` knows how often to try
    if ca_file:
        if not Path(ca_file).is_file():
            raise UserError(f"ca_file={ca_file} is no file")
        configuration.ssl_ca_cert = ca_file
    configuration.api_key_prefix["authorization"] = "Bearer"
    token = os.environ.get(TOKEN, "").strip()
    if token_file or not token:
        path = _token_path(token_file)
        if path:
            from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

            configuration.api_key["authorization"] = ""  # without a key the client does not ask the hook
            configuration.refresh_api_key_hook = ServiceAccountTokenVolumeCredentials(path).refresh_api_key_hook
    else:
        configuration.api_key["authorization"] = token
    return configuration


def _token_path(token_file: str) -> str:
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    if token_file and not os.access(token_file, os.R_OK):
        raise UserError(f"token_file={token_file} cannot be read")
    candidates: Iterable[str] = (token_file, os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, ""), KF_PIPELINES_SA_TOKEN_PATH)
    return next((path for path in candidates if path and os.access(path, os.R_OK)), "")


def _namespace(namespace: str, several: bool) -> str | None:
    if namespace or not several:
        return namespace or None
    if NAMESPACE_FILE.is_file():
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    raise UserError("namespace= is needed: this server has one for each user or team")


def _said(error: Any) -> str:
    """The server's own words, in one line."""
    try:
        body = json.loads(error.body or "")
    except ValueError:
        body = {}
    words = (body.get("message") or body.get("error_message") or body.get("error")) if isinstance(body, dict) else None
    words = " ".join(str(words or error.reason or "").split())
    return f": {words[:300]}" if words else ""
