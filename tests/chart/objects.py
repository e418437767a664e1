"""Rules about every object: labels, names, namespaces, empty values, doubles, environment variables.

No command; test_rules.py breaks each rule once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from manifests import Doc, annotations, labels, pods, title, walk

RECOMMENDED = [
    f"app.kubernetes.io/{key}" for key in ("name", "instance", "version", "component", "part-of", "managed-by")
]
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume", "StorageClass", "PriorityClass"}
LENGTH = {"Service": 63, "CronJob": 52, "Job": 63, "Deployment": 63, "StatefulSet": 52, "Pod": 63}
"""CronJob and StatefulSet put something behind their names that has to be a label."""


def recommended(docs: Iterable[Doc]) -> Iterator[str]:
    """Every object says what it is, by the labels that Kubernetes recommends."""
    for doc in docs:
        for key in RECOMMENDED:
            if not labels(doc).get(key):
                yield f"{title(doc)}: no label {key}"
    for pod in pods(docs):
        for key in (RECOMMENDED[0], RECOMMENDED[1], RECOMMENDED[3]):
            if not pod.labels.get(key):
                yield f"{pod.title}: its pods have no label {key}"


def of_a_chart(docs: Iterable[Doc]) -> Iterator[str]:
    """Every object says which chart it comes from."""
    for doc in docs:
        if not labels(doc).get("helm.sh/chart"):
            yield f"{title(doc)}: no label helm.sh/chart"


def names(docs: Iterable[Doc]) -> Iterator[str]:
    """Names and labels are such that an API server takes them."""
    for doc in docs:
        name = doc["metadata"]["name"]
        if not NAME.fullmatch(name) or len(name) > LENGTH.get(doc["kind"], 253):
            yield f"{title(doc)}: not a name that {doc['kind']} may have ({len(name)} characters)"
        if doc["kind"] == "Service" and "." in name:
            yield f"{title(doc)}: a dot in a Service's name"
        for where in (doc, *(pod.template for pod in pods([doc]))):
            for key, value in labels(where).items():
                if not KEY.fullmatch(key) or not isinstance(value, str) or not LABEL.fullmatch(value):
                    yield f"{title(doc)}: {key}={value!r} is no label"
            for key, value in annotations(where).items():
                if not KEY.fullmatch(key) or not isinstance(value, str):
                    yield f"{title(doc)}: {key}={value!r} is no annotation"


def doubles(docs: Iterable[Doc]) -> Iterator[str]:
    """No object twice; in a container no variable, port or mount twice."""
    for key, count in Counter((title(doc), doc["metadata"].get("namespace")) for doc in docs).items():
        if count > 1:
            yield f"{key[0]}: {count} times"
    for pod in pods(docs):
        every = pod.containers()
        for name, count in Counter(container["name"] for container in every).items():
            if count > 1:
                yield f"{pod.title}: {count} containers {name}"
        for container in every:
            lists = {"env": "name", "ports": "containerPort"}
            for part, key in lists.items():
                for name, count in Counter(item[key] for item in container.get(part) or []).items():
                    if count > 1:
                        yield f"{pod.title}: container {container['name']}: {part} {name} {count} times"


def empties(docs: Iterable[Doc]) -> Iterator[str]:
    """A null is a template that forgot something: the schemas take it, the server drops it without a word."""
    for doc in docs:
        for path, value in walk(doc):
            if value is None:
                yield f"{title(doc)}: {path} is null"
            if isinstance(value, str) and ("<no value>" in value or "%!" in value or "{{" in value):
                yield f"{title(doc)}: {path} was not rendered: {value[:60]!r}"


def places(namespace: str, docs: Iterable[Doc]) -> Iterator[str]:
    """Everything lies in the release's namespace; nothing is cluster-wide."""
    for doc in docs:
        if doc["kind"] in CLUSTER_WIDE:
            yield f"{title(doc)}: is cluster-wide"
        elif doc["metadata"].get("namespace", namespace) != namespace:
            yield f"{title(doc)}: lies in {doc['metadata']['namespace']}, not in {namespace}"


def selectors(docs: Iterable[Doc]) -> Iterator[str]:
    """Selectors cannot be changed later: nothing that changes with a version is in them, and they tell releases apart."""
    for doc in docs:
        selector = (doc.get("spec") or {}).get("selector")
        if doc["kind"] not in ("Deployment", "StatefulSet", "Service") or not selector:
            continue
        chosen = selector if doc["kind"] == "Service" else selector.get("matchLabels") or {}
        for key in ("helm.sh/chart", "app.kubernetes.io/version", "app.kubernetes.io/managed-by"):
            if key in chosen:
                yield f"{title(doc)}: selects by {key}, which a new version changes"
        for key in ("app.kubernetes.io/instance", "app.kubernetes.io/component"):
            if key not in chosen:
                yield f"{title(doc)}: does not select by {key}"


RULES = [recommended, names, doubles, empties, selectors]
