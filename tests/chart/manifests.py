"""Kubernetes manifests as the rules read them. No command; every rule of this folder begins here.

A rule is a function: documents -> findings, each a line `Kind/name: what is wrong`. No finding, no objection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

Doc = dict[str, Any]
LONG_RUNNING = ("Deployment", "StatefulSet", "DaemonSet")


class StrictLoader(yaml.CSafeLoader):
    """YAML that refuses a key twice in one mapping, of which Kubernetes would silently take the last."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = [(loader.construct_object(key, deep=True), value) for key, value in node.value]
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} twice", node.start_mark)
    return {key: loader.construct_object(value, deep=True) for key, value in pairs}


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str) -> list[Doc]:
    """The documents of a stream, empty ones left out."""
    return [doc for doc in yaml.load_all(text, Loader=StrictLoader) if doc]


def title(doc: Doc) -> str:
    """Kind/name."""
    return f"{doc.get('kind')}/{doc.get('metadata', {}).get('name')}"


def named(docs: Iterable[Doc], kind: str, name: str | None = None) -> Iterator[Doc]:
    """The documents of a kind (and name)."""
    return (doc for doc in docs if doc["kind"] == kind and name in (None, doc["metadata"]["name"]))


def annotations(doc: Doc) -> dict[str, str]:
    """A document's annotations."""
    return doc.get("metadata", {}).get("annotations") or {}


def labels(doc: Doc) -> dict[str, str]:
    """A document's labels, or a pod template's."""
    return doc.get("metadata", {}).get("labels") or {}


def hooks(doc: Doc) -> set[str]:
    """Helm's hooks that a document belongs to."""
    return set(filter(None, annotations(doc).get("helm.sh/hook", "").replace(" ", "").split(",")))


@dataclass(frozen=True)
class Pod:
    """A pod that a document starts."""

    owner: Doc
    template: Doc
    """metadata and spec."""

    @property
    def title(self) -> str:
        return title(self.owner)

    @property
    def spec(self) -> Doc:
        return self.template.get("spec") or {}

    @property
    def labels(self) -> dict[str, str]:
        return labels(self.template)

    @property
    def is_long_running(self) -> bool:
        return self.owner["kind"] in LONG_RUNNING

    def containers(self, init: bool = True) -> list[Doc]:
        """Its containers, those that run before the others first."""
        before = [*(self.spec.get("initContainers") or []), *(self.spec.get("ephemeralContainers") or [])]
        return [*(before if init else []), *(self.spec.get("containers") or [])]


def pods(docs: Iterable[Doc]) -> Iterator[Pod]:
    """Every pod that the documents start."""
    for doc in docs:
        if doc["kind"] == "Pod":
            yield Pod(doc, doc)
        elif doc["kind"] in (*LONG_RUNNING, "Job", "ReplicaSet"):
            yield Pod(doc, doc["spec"]["template"])
        elif doc["kind"] == "CronJob":
            yield Pod(doc, doc["spec"]["jobTemplate"]["spec"]["template"])


def matches(selector: Doc | None, labels: dict[str, str]) -> bool:
    """Whether a LabelSelector picks something with these labels; an empty one picks everything, none nothing."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for rule in selector.get("matchExpressions") or []:
        key, operator, values = rule["key"], rule["operator"], rule.get("values") or []
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not holds[operator]:
            return False
    return True


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a value with its path."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for n, item in enumerate(value):
            yield from walk(item, f"{path}[{n}]")
    else:
        yield path, value
