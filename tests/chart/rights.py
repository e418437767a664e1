"""Rules about RBAC and service account tokens: least privilege, no wildcards.

No command; test_rules.py breaks each rule once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from manifests import Doc, labels, named, pods, title

WRITES_RIGHTS = {"escalate", "bind", "impersonate"}
READS_SECRETS = {"list", "watch", "deletecollection", "delete", "update"}


def roles(docs: Iterable[Doc]) -> Iterator[str]:
    """No wildcard, no right to give rights, of Secrets only named ones (and `create`, which cannot be named)."""
    for doc in docs:
        if doc["kind"] in ("ClusterRole", "ClusterRoleBinding"):
            yield f"{title(doc)}: rights beyond the namespace"
        if doc["kind"] not in ("Role", "ClusterRole"):
            continue
        for rule in doc.get("rules") or []:
            for key in ("apiGroups", "resources", "verbs", "resourceNames"):
                if any("*" in item for item in rule.get(key) or []):
                    yield f"{title(doc)}: wildcard in {key}"
            verbs, resources = set(rule.get("verbs") or []), set(rule.get("resources") or [])
            if verbs & WRITES_RIGHTS:
                yield f"{title(doc)}: {', '.join(sorted(verbs & WRITES_RIGHTS))}"
            if "secrets" in resources:
                if verbs & READS_SECRETS:
                    yield f"{title(doc)}: {', '.join(sorted(verbs & READS_SECRETS))} of secrets"
                if verbs - {"create"} and not rule.get("resourceNames"):
                    yield f"{title(doc)}: {', '.join(sorted(verbs - {'create'}))} of secrets without resourceNames"
            if rule.get("resourceNames") and "create" in verbs:
                yield f"{title(doc)}: create with resourceNames is never granted"
            if resources & {"pods/exec", "pods/attach", "pods/portforward", "nodes", "serviceaccounts/token"}:
                yield f"{title(doc)}: {', '.join(sorted(resources))}"


def bindings(docs: list[Doc]) -> Iterator[str]:
    """A binding is of a role of the rendering to an account of the rendering (or one brought along, in this namespace)."""
    for binding in named(docs, "RoleBinding"):
        reference = binding["roleRef"]
        if reference["kind"] != "Role" or not list(named(docs, "Role", reference["name"])):
            yield f"{title(binding)}: {reference['kind']}/{reference['name']} is not of this rendering"
        for subject in binding.get("subjects") or []:
            if subject["kind"] != "ServiceAccount" or subject["name"] in ("default", ""):
                yield f"{title(binding)}: rights for {subject['kind']}/{subject['name']}"
    bound = {binding["roleRef"]["name"] for binding in named(docs, "RoleBinding")}
    for role in named(docs, "Role"):
        if role["metadata"]["name"] not in bound:
            yield f"{title(role)}: bound to nobody"


def tokens(docs: list[Doc]) -> Iterator[str]:
    """Only a pod that has rights, or shows its token to Kubeflow Pipelines, has a token."""
    bound = {s["name"] for binding in named(docs, "RoleBinding") for s in binding.get("subjects") or []}
    for pod in pods(docs):
        account = pod.spec.get("serviceAccountName", "default")
        if account == "default":
            yield f"{pod.title}: runs as the namespace's default account"
        if account not in bound and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.title}: has a token and no rights (automountServiceAccountToken: false)"
    for account in named(docs, "ServiceAccount"):
        is_pipeline = labels(account).get("app.kubernetes.io/component") == "pipeline"  # KFP's launcher needs the token
        if account.get("automountServiceAccountToken") is not False and not is_pipeline:
            yield f"{title(account)}: automountServiceAccountToken must be false, pods ask for it themselves"


RULES = [roles, bindings, tokens]
