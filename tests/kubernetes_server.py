"""A stand-in for the API server of Kubernetes (no cluster here): its protocol for Secrets and for asking about rights.

What it keeps to of the real one: a Secret is created once (409), read or patched by name (404), patched by a JSON merge
patch with the content type that says so (415), and, where the patch names a resourceVersion, in that version only (409);
values are base64; an immutable Secret cannot be changed (422). `rights` are what SelfSubjectAccessReview allows; the
calls themselves are allowed unless `faults` say otherwise.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.serving import Quiet, Stand


class KubernetesServer(Stand):
    """The stand-in, at `url`."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        """NAMESPACE/NAME -> the object."""
        self.rights: set[str] = set()
        """What the caller may: "VERB RESOURCE[.GROUP][/SUBRESOURCE][:NAME]"."""
        self.faults: list[tuple[str, int | str]] = []
        """(METHOD /path-pattern, what): a status, `drop` (connection cut), `lose` (done, then cut)."""
        self.before: dict[str, Any] = {}
        """Pattern -> a function called once before such a call is answered: somebody else is faster."""
        self.calls: list[str] = []
        self.version = 1
        self.lock = threading.RLock()
        super().__init__(_handler(self))

    def kubeconfig(self, folder: Path) -> str:
        """A kubeconfig for this server."""
        path = folder / "kubeconfig"
        user = {"name": "u", "user": {"token": "t"}}
        context = {"name": "c", "context": {"cluster": "k", "user": "u"}}
        cluster = {"name": "k", "cluster": {"server": self.url}}
        lists = {"clusters": [cluster], "users": [user], "contexts": [context]}
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", **lists}))
        return str(path)

    def put(self, name: str, namespace: str = "ns", immutable: bool = False, **texts: str) -> None:
        """Somebody else makes or replaces a Secret."""
        data = {key.replace("_dot_", "."): base64.b64encode(text.encode()).decode() for key, text in texts.items()}
        kept = {"metadata": {"name": name, "namespace": namespace}, "data": data, "immutable": immutable}
        self._keep(f"{namespace}/{name}", kept)

    def texts(self, name: str, namespace: str = "ns") -> dict[str, str]:
        """What a Secret holds."""
        return {k: base64.b64decode(v).decode() for k, v in self.secrets[f"{namespace}/{name}"]["data"].items()}

    def answer(self, call: str, body: dict[str, Any], kind: str) -> tuple[int, dict[str, Any]]:
        """Status and object."""
        with self.lock:
            if call == "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
                return 201, body | {"status": {"allowed": _word(body["spec"]["resourceAttributes"]) in self.rights}}
            found = re.fullmatch(r"(GET|POST|PATCH) /api/v1/namespaces/([^/]+)/secrets(?:/([^/]+))?", call)
            if not found:
                return 404, {"message": f"no such path: {call}"}
            method, namespace, name = found.groups()
            place = f"{namespace}/{name or body['metadata']['name']}"
            there = self.secrets.get(place)
            if method == "POST":
                if there:
                    return 409, {"message": f"secrets {place} already exists", "reason": "AlreadyExists"}
                return 201, self._keep(place, body)
            if there is None:
                return 404, {"message": f"secrets {place} not found", "reason": "NotFound"}
            return (200, there) if method == "GET" else self._patch(place, there, body, kind)

    def _patch(self, place: str, there: Any, body: dict[str, Any], kind: str) -> tuple[int, dict[str, Any]]:
        if kind not in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
            return 415, {"message": f"the body of the request was in an unknown format: {kind}"}
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted not in (None, there["metadata"]["resourceVersion"]):
            return 409, {"message": "the object has been modified", "reason": "Conflict"}
        if there.get("immutable"):
            return 422, {"message": f"Secret {place} is invalid: data: field is immutable when `immutable` is set"}
        return 200, self._keep(place, there | {"data": there.get("data", {}) | body.get("data", {})})

    def _keep(self, place: str, secret: dict[str, Any]) -> dict[str, Any]:
        for value in secret.get("data", {}).values():
            base64.b64decode(value, validate=True)
        with self.lock:
            self.version += 1
            kept = secret | {"metadata": secret["metadata"] | {"resourceVersion": str(self.version)}}
            self.secrets[place] = kept
            return kept


def _word(asked: dict[str, str]) -> str:
    parts = [
        ("", asked["resource"]),
        (".", asked.get("group")),
        ("/", asked.get("subresource")),
        (":", asked.get("name")),
    ]
    return f"{asked['verb']} " + "".join(f"{sign}{part}" for sign, part in parts if part)


def _handler(server: KubernetesServer) -> type[Quiet]:
    class Handler(Quiet):
        def serve(self) -> None:
            call = f"{self.command} {urlsplit(self.path).path}"
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            with server.lock:
                server.calls.append(call)
                fault = next((entry for entry in server.faults if re.search(entry[0], call)), None)
                if fault:
                    server.faults.remove(fault)
                for pattern in [p for p in server.before if re.search(p, call)]:
                    server.before.pop(pattern)()
            what = fault[1] if fault else 0
            if what == "drop":
                return
            if isinstance(what, int) and what:
                status, reply = what, {"message": f"fault {what}"}
            else:
                status, reply = server.answer(call, body, self.headers.get("Content-Type", ""))
            if what == "lose":
                return
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = serve

    return Handler
