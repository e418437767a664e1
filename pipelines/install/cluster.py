"""The Kubernetes API, for what the chart's commands ask of it: a client, this pod's namespace, errors in one line.

No command runs this module. In a pod the service account speaks; elsewhere `KUBECONFIG` says who and where.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.install.patience import Unsettled
from pipelines.kfp_api import NAMESPACE_FILE
from selectmoe.errors import Unavailable, UserError

TIMEOUT = (5, 30)
"""Seconds to connect, seconds to wait for an answer."""
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def api_client() -> Any:
    """A client of the Kubernetes API that asks once: `patiently` asks again.

    Raises:
        UserError: this is no pod, and there is no kubeconfig.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        try:
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
        except config.ConfigException as error:
            text = " ".join(str(error).split())
            raise UserError(f"no pod of a cluster, and no kubeconfig ({text}): set KUBECONFIG") from None
    configuration.retries = False
    return client.ApiClient(configuration)


def own_namespace(given: str) -> str:
    """The namespace that is meant: the one given, else the pod's own.

    Raises:
        UserError: none is given outside a pod, or it is no name of a namespace.
    """
    name = given or (NAMESPACE_FILE.read_text(encoding="utf-8").strip() if NAMESPACE_FILE.is_file() else "")
    if not name:
        raise UserError("namespace= is needed outside a pod")
    if not NAMESPACE.fullmatch(name):
        raise UserError(f"namespace={name} is no name of a namespace")
    return name


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn the client's errors into one line.

    Args:
        doing: what is being done, such as "creating secret x".

    Raises:
        Unavailable: no answer, 429 or 5xx.
        Unsettled: 401 or 403: the right may have been given this moment.
        UserError: the API server refuses.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        status, said = error.status or 0, _said(error)
        if status == 429 or status >= 500:
            raise Unavailable(f"{doing}: the Kubernetes API answers {status}{said}") from None
        if status in (401, 403):
            raise Unsettled(f"{doing}: this service account may not ({status}){said}") from None
        raise UserError(f"{doing}: the Kubernetes API refuses ({status}){said}") from None
    except (HTTPError, OSError) as error:
        raise Unavailable(f"{doing}: the Kubernetes API does not answer ({type(error).__name__})") from None


def _said(error: Any) -> str:
    """The server's own words; never a body, which may be a Secret."""
    try:
        message = json.loads(error.body or "{}").get("message") or error.reason
    except (ValueError, AttributeError):
        message = error.reason
    return f": {' '.join(str(message).split())[:300]}" if message else ""
