"""Prove that a part of the installation works: what `helm test` runs.

    python -m pipelines.install prove what=s3 bucket=select-moe
    python -m pipelines.install prove what=mlflow
    python -m pipelines.install prove what=kfp endpoint=http://ml-pipeline.kubeflow:8888
    python -m pipelines.install prove what=rights "can=[get pods]" "cannot=[list secrets,create pods/exec]"

`s3` writes, reads and deletes an object; `mlflow` makes a run, takes an artifact there and back and deletes the run;
`kfp` asks for its health and, with this pod's token, for the pipelines; `rights` asks the Kubernetes API what the
service account of this pod may do: everything in `can`, nothing in `cannot`, each of the form
"VERB RESOURCE[.GROUP][/SUBRESOURCE][:NAME]".
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.install import cluster
from pipelines.install.options import WAIT, Connection, option, options
from pipelines.install.patience import patiently
from selectmoe.errors import Refused, Unavailable, UserError

RIGHT = re.compile(r"([a-z*]+) ([a-z]+)(?:\.([a-z0-9.-]+))?(?:/([a-z]+))?(?::([a-z0-9.-]+))?")


class Missing(Unavailable):
    """A right is missing, so far."""


@dataclass(frozen=True, kw_only=True)
class Options(Connection):
    """The keys of the command."""

    what: str = option("s3, mlflow, kfp or rights")
    bucket: str = option("s3: the bucket", "")
    namespace: str = option("kfp, rights: namespace; in a pod its own", "")
    can: list[str] = options("rights: what the service account must be allowed to do")
    cannot: list[str] = options("rights: what it must not be allowed to do")
    wait: int = option(WAIT, 60)


def run(options: Options) -> None:
    """Prove it, and say so in one line.

    Raises:
        UserError: a setting is missing or wrong, credentials are refused.
        Refused: a right is missing, or there is one too many.
        Unavailable: what is to be proved does not answer.
    """
    proofs: dict[str, Callable[[Options], str]] = {"s3": s3, "mlflow": mlflow, "kfp": kfp, "rights": rights}
    if options.what not in proofs:
        raise UserError(f"what={options.what} must be one of {', '.join(proofs)}")
    print(f"{options.what}: {proofs[options.what](options)}", flush=True)


def s3(options: Options) -> str:
    """An object goes to the bucket and back, and is deleted."""
    from selectmoe.storage import S3Store

    if not options.bucket:
        raise UserError("bucket= is needed")
    name = f".proof-{uuid.uuid4().hex}"  # its own: several proofs may run at the same time

    def proved() -> None:
        store = S3Store(f"s3://{options.bucket}", attempts=2, patience=10)
        store.put_bytes(name, name.encode())
        if store.get(name) != name.encode():
            raise Unavailable(f"{store.uri(name)} does not read back")
        store.delete(name)
        if store.get(name) is not None:
            raise Unavailable(f"{store.uri(name)} was deleted and is still there")

    patiently(options.wait, proved)
    return f"an object was written to {options.bucket}, read and deleted"


def mlflow(options: Options) -> str:
    """A run with an artifact is made, read back and deleted."""
    from selectmoe import tracking

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")):
        raise UserError("MLFLOW_TRACKING_URI must be the MLflow server's address")
    tracking.prove(uri, seconds=options.wait)
    return f"an artifact went to {uri} and back"


def kfp(options: Options) -> str:
    """The API server is well, and accepts our token."""

    def asked() -> str:
        server = options.server()
        return f"{server.endpoint} answers; pipelines that we see: {server.pipelines()}"

    return patiently(options.wait, asked)


def rights(options: Options) -> str:
    """The service account may do what it must and nothing of what it must not."""
    if not options.can and not options.cannot:
        raise UserError("can=[...] or cannot=[...] is needed")
    asked = {word: _right(word) for word in (*options.can, *options.cannot)}
    namespace, client = cluster.own_namespace(options.namespace), cluster.api_client()

    def wrong() -> list[str]:
        missing = [word for word in options.can if not _may(client, namespace, asked[word])]
        if missing:  # rights that were given this moment hold a little later
            raise Missing(f"in namespace {namespace} it may not {'; may not '.join(missing)}, and must")
        return [word for word in options.cannot if _may(client, namespace, asked[word])]

    try:
        many = patiently(options.wait, wrong)
    except Missing as error:
        raise Refused(str(error)) from None
    if many:
        raise Refused(f"in namespace {namespace} it may {'; may '.join(many)}, and must not")
    return f"as they must be in namespace {namespace}: {len(options.can)} given, {len(options.cannot)} not"


def _right(word: str) -> dict[str, str]:
    found = RIGHT.fullmatch(word)
    if not found:
        raise UserError(
            f"{word!r} is no right: VERB RESOURCE[.GROUP][/SUBRESOURCE][:NAME], such as get pods or create pods/exec"
        )
    return dict(zip(("verb", "resource", "group", "subresource", "name"), found.groups(default=""), strict=True))


def _may(client: object, namespace: str, right: dict[str, str]) -> bool:
    from kubernetes.client import AuthorizationV1Api

    attributes = {key: value for key, value in {"namespace": namespace, **right}.items() if value}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    with cluster.explained("asking for rights"):
        answer = AuthorizationV1Api(client).create_self_subject_access_review(body, _request_timeout=cluster.TIMEOUT)
    return bool(answer.status.allowed)
