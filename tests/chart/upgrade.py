"""Rules about an upgrade from one rendering to another: what an API server would refuse, and what would lose data.

No command; test_rules.py breaks each rule once, test_upgrade.py compares the chart with its last released rendering.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests import Doc, annotations, hooks, title
from wiring import made
from workloads import quantity

IMMUTABLE = {
    "Deployment": ["spec.selector"],
    "DaemonSet": ["spec.selector"],
    "StatefulSet": ["spec.selector", "spec.serviceName", "spec.volumeClaimTemplates", "spec.podManagementPolicy"],
    "Job": ["spec.selector", "spec.template", "spec.completions", "spec.completionMode"],
    "PersistentVolumeClaim": ["spec.accessModes", "spec.storageClassName", "spec.volumeMode", "spec.selector"],
    "RoleBinding": ["roleRef"],
    "Service": ["spec.clusterIP"],
    "Secret": ["type"],
}
KEPT = "helm.sh/resource-policy"


def field(doc: Doc, path: str) -> Any:
    """A field by its dotted path; none where it is not."""
    at: Any = doc
    for key in path.split("."):
        at = (at or {}).get(key)
    return at


def is_recreated(doc: Doc) -> bool:
    """Whether Helm deletes the object before it makes it again, so that it may change."""
    return bool(hooks(doc))


def changes(old: list[Doc], new: list[Doc]) -> Iterator[str]:
    """What of an upgrade fails, or loses data or passwords."""
    now = {title(doc): doc for doc in new}
    for doc in old:
        name = title(doc)
        if name not in now:
            if doc["kind"] == "PersistentVolumeClaim" and annotations(doc).get(KEPT) != "keep":
                yield f"{name}: is gone, and its data with it"
            if doc["kind"] == "StatefulSet":
                yield f"{name}: is gone, its volumes stay behind unused"
            continue
        for path in () if is_recreated(doc) else IMMUTABLE.get(doc["kind"], []):
            if field(doc, path) != field(now[name], path):
                yield f"{name}: {path} cannot be changed"
        if doc["kind"] == "PersistentVolumeClaim":
            before, after = (quantity(d["spec"]["resources"]["requests"]["storage"]) for d in (doc, now[name]))
            if after < before:
                yield f"{name}: a claim cannot shrink"
            if annotations(doc).get(KEPT) == "keep" != annotations(now[name]).get(KEPT):
                yield f"{name}: is no longer kept"
    secrets = made(new)
    for name, keys in made(old).items():
        if lost := sorted(keys - secrets.get(name, set())):
            yield f"Secret/{name}: {lost[0]} is no longer there"


def left_behind(docs: list[Doc]) -> Iterator[str]:
    """Objects that an uninstall leaves and that are not marked so: hooks, which Helm does not own, that nothing deletes."""
    for doc in docs:
        policy = annotations(doc).get("helm.sh/hook-delete-policy", "")
        if hooks(doc) and annotations(doc).get(KEPT) != "keep" and "hook-succeeded" not in policy:
            if doc["kind"] == "Job" and "ttlSecondsAfterFinished" in doc["spec"]:
                continue
            yield f"{title(doc)}: a hook that stays after an uninstall"
        if doc["kind"] == "StatefulSet" and doc["spec"].get("volumeClaimTemplates"):
            yield f"{title(doc)}: its claims stay after an uninstall, and nothing says so"


def kept(docs: list[Doc]) -> Iterator[str]:
    """Claims are kept over an uninstall, unless what is on them is temporary; nothing else is."""
    for doc in docs:
        is_kept = annotations(doc).get(KEPT) == "keep"
        is_temporary = doc["metadata"]["name"].endswith("-scratch")
        if doc["kind"] == "PersistentVolumeClaim" and not is_kept and not is_temporary:
            yield f"{title(doc)}: {KEPT}: keep is missing"
        if is_kept and doc["kind"] not in ("PersistentVolumeClaim", "Secret"):
            yield f"{title(doc)}: is kept, and holds no data"
