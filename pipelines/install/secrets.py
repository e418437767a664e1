"""Create the Secrets that are missing, and the keys that a Secret lacks; what is there is never changed.

    python -m pipelines.install secrets spec=/etc/select-moe/secrets.yaml

The file says which keys are wanted, not what is in them:

    secrets:
    - name: select-moe-s3
      labels: {app.kubernetes.io/part-of: select-moe}
      annotations: {helm.sh/resource-policy: keep}
      keys:
        user: {value: admin}
        AWS_ACCESS_KEY_ID: {random: 20}
        AWS_SECRET_ACCESS_KEY: {random: 40}
        s3.json: {seaweedfs: {access_key: AWS_ACCESS_KEY_ID, secret_key: AWS_SECRET_ACCESS_KEY}}

`random` is so many letters and digits, `value` a text that is no secret, `seaweedfs` the configuration of SeaweedFS's S3
server, made from other keys of the same Secret. Rights needed: create Secrets; get and patch those named.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import string
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.install.cluster import TIMEOUT, api_client, explained, own_namespace
from pipelines.install.options import WAIT, option
from pipelines.install.patience import patiently
from selectmoe.errors import Unavailable, UserError

ALPHABET = string.ascii_letters + string.digits
SHORTEST, LONGEST = 12, 128
SECRET_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
KEY_NAME = re.compile(r"[-._a-zA-Z0-9]{1,253}")
ACTIONS = ["Admin", "Read", "List", "Tagging", "Write"]
"""What the one S3 user may do: everything, making the bucket included."""
ROUNDS = 10
"""How often somebody else may change a Secret while we add to it."""


@dataclass(frozen=True)
class Options:
    """The keys of the command."""

    spec: str = option("YAML file that says which Secrets and keys are wanted")
    namespace: str = option("namespace; in a pod its own", "")
    wait: int = option(WAIT, 300)


@dataclass(frozen=True)
class Wanted:
    """A Secret that is to be there."""

    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    keys: Mapping[str, Mapping[str, Any]]


def run(options: Options) -> None:
    """Create what is missing, and say which keys that was.

    Raises:
        UserError: the file is wrong, or the rights are missing.
        Unavailable: the Kubernetes API does not answer.
    """
    wanted = load(Path(options.spec))
    namespace, client = own_namespace(options.namespace), api_client()
    for secret in wanted:

        def ensured(secret: Wanted = secret) -> str:
            return ensure(client, namespace, secret)

        print(f"secret {secret.name}: {patiently(options.wait, ensured)}", flush=True)


def load(path: Path) -> list[Wanted]:
    """The Secrets that a file wants.

    Raises:
        UserError: no such file, not YAML, or a rule that is not known; names the place.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"spec={path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"spec={path} is not YAML") from None
    entries = content.get("secrets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or {*content} != {"secrets"}:
        raise UserError(f"spec={path} must hold one list, `secrets`")
    return [_wanted(f"{path}: secrets[{n}]", entry) for n, entry in enumerate(entries)]


def _wanted(where: str, entry: Any) -> Wanted:
    if not isinstance(entry, dict) or not {"name", "keys"} <= {*entry} <= {"name", "keys", "labels", "annotations"}:
        raise UserError(f"{where} must have name and keys, and may have labels and annotations")
    name, keys = entry["name"], entry["keys"]
    if not isinstance(name, str) or not SECRET_NAME.fullmatch(name):
        raise UserError(f"{where}.name={name!r} is no name of a Secret")
    if not isinstance(keys, dict) or not keys:
        raise UserError(f"{where}.keys must be a mapping: key -> random, value or seaweedfs")
    for key, rule in keys.items():
        if not KEY_NAME.fullmatch(str(key)):
            raise UserError(f"{where}.keys: {key!r} is no key of a Secret")
        _check(f"{where}.keys.{key}", rule, keys)
    return Wanted(name, entry.get("labels") or {}, entry.get("annotations") or {}, keys)


def _check(where: str, rule: Any, keys: Mapping[str, Any]) -> None:
    kind, content = next(iter(rule.items())) if isinstance(rule, dict) and len(rule) == 1 else ("", None)
    if kind == "random" and type(content) is int and SHORTEST <= content <= LONGEST:
        return
    if kind == "value" and isinstance(content, str) and content:
        return
    if kind == "seaweedfs" and isinstance(content, dict) and {*content} == {"access_key", "secret_key"}:
        simple = {key for key, other in keys.items() if isinstance(other, dict) and "seaweedfs" not in other}
        if {*content.values()} <= simple:
            return
    raise UserError(
        f"{where} must be one of {{random: {SHORTEST} to {LONGEST}}}, {{value: TEXT}}, "
        "{seaweedfs: {access_key: KEY, secret_key: KEY}} with two other keys of this Secret"
    )


def ensure(client: Any, namespace: str, wanted: Wanted) -> str:
    """Make a Secret as it is wanted, without changing a key that it has.

    Whoever comes second adds to what the first one made: a Secret is made only where there is none, and changed only in the
    version that was read.

    Args:
        client: of the Kubernetes API.
        namespace: where.
        wanted: the Secret.

    Returns:
        What was done; keys by name.
    """
    from kubernetes.client import CoreV1Api

    core = CoreV1Api(client)
    for _ in range(ROUNDS):
        found = _ask(core.read_namespaced_secret, 404, f"reading secret {wanted.name}", wanted.name, namespace)
        has = {key: base64.b64decode(value).decode() for key, value in ((found and found.data) or {}).items()}
        missing = [key for key in wanted.keys if key not in has]
        if found is not None and not missing:
            _compare(wanted, has)
            return "there already"
        data = {key: base64.b64encode(text.encode()).decode() for key, text in _made(wanted, has).items()}
        meta: dict[str, Any]
        if found is None:
            meta = {"name": wanted.name, "labels": {**wanted.labels}, "annotations": {**wanted.annotations}}
            body = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": meta, "data": data}
            done = _ask(core.create_namespaced_secret, 409, f"creating secret {wanted.name}", namespace, body)
            said = f"made, with {', '.join(missing)}"
        else:
            body = {"metadata": {"resourceVersion": found.metadata.resource_version}, "data": data}
            done = _ask(
                core.patch_namespaced_secret, 409, f"adding to secret {wanted.name}", wanted.name, namespace, body
            )
            said = f"was there; added {', '.join(missing)}"
        if done is not None:
            return said
    raise Unavailable(f"secret {wanted.name}: somebody else changes it all the time")


def _ask(method: Callable[..., Any], expected: int, doing: str, *arguments: Any) -> Any:
    """Call the API; None where the answer is the one that says: look again."""
    from kubernetes.client import ApiException

    with explained(doing):
        try:
            return method(*arguments, _request_timeout=TIMEOUT)
        except ApiException as error:
            if error.status == expected:
                return None
            raise


def _made(wanted: Wanted, has: Mapping[str, str]) -> dict[str, str]:
    """The keys that are missing; what is made from other keys is made from those that are there, too."""
    made: dict[str, str] = {}
    for key, rule in sorted(wanted.keys.items(), key=lambda entry: "seaweedfs" in entry[1]):
        if key not in has:
            made[key] = _value(rule, {**has, **made})
    return made


def _value(rule: Mapping[str, Any], others: Mapping[str, str]) -> str:
    if "random" in rule:
        return "".join(secrets.choice(ALPHABET) for _ in range(rule["random"]))
    if "value" in rule:
        return str(rule["value"])
    keys = rule["seaweedfs"]
    credentials = [{"accessKey": others[keys["access_key"]], "secretKey": others[keys["secret_key"]]}]
    identity = {"name": "select-moe", "credentials": credentials, "actions": ACTIONS}
    return json.dumps({"identities": [identity]}, indent=1)


def _compare(wanted: Wanted, has: Mapping[str, str]) -> None:
    """Say where a key that was made from others no longer fits them (somebody changed one of them)."""
    for key, rule in wanted.keys.items():
        others = rule.get("seaweedfs", {}).values()
        if not all(has[other] in has[key] for other in others):
            line = f"secret {wanted.name}: {key} does not fit {' and '.join(others)} any more; delete {key} to have it made anew"
            print(line, file=sys.stderr, flush=True)
