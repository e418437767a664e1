"""Rules about what refers to what: selectors and pods, Services and ports, names of ConfigMaps, Secrets, claims, accounts.

No command; test_rules.py breaks each rule once. What a rendering refers to is rendered too, made by the chart's
`secrets` Job (its specification is part of the rendering), or brought by the user, who then names it in the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from manifests import Doc, Pod, hooks, labels, matches, named, pods, title

SPEC = "secrets.yaml"
"""Key of the ConfigMap that the `secrets` Job reads."""
PROFILE = "profile.yaml"
"""Key of the ConfigMap that holds the pipeline's site profile."""
BRING = {
    "existingSecret": "Secret",
    "existingConfigMap": "ConfigMap",
    "existingClaim": "PersistentVolumeClaim",
    "imagePullSecrets": "Secret",
}
ELSEWHERE = ("pipeline", "extra")
"""Components whose objects are used by pods that Kubeflow Pipelines starts, or that the user knows about."""
GIVEN = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
"""In every namespace."""


def configs(docs: Iterable[Doc], key: str) -> list[Any]:
    """What the ConfigMaps of a rendering hold under a key, as YAML."""
    maps = named(docs, "ConfigMap")
    return [yaml.safe_load(config["data"][key]) for config in maps if key in (config.get("data") or {})]


def made(docs: Iterable[Doc]) -> dict[str, set[str]]:
    """The Secrets that the chart's Job makes, with their keys."""
    return {secret["name"]: set(secret["keys"]) for spec in configs(docs, SPEC) for secret in spec["secrets"]}


def brought(values: Any) -> set[tuple[str, str]]:
    """Kind and name of what the values say the user brings."""
    found: set[tuple[str, str]] = set()
    if isinstance(values, dict):
        for key, value in values.items():
            for item in value if isinstance(value, list) else [value]:
                name = item.get("name") if isinstance(item, dict) else item
                if key in BRING and name:
                    found.add((BRING[key], str(name)))
            if key == "serviceAccount" and isinstance(value, dict) and not value.get("create", True):
                found.add(("ServiceAccount", value.get("name") or "default"))
            found |= brought(value)
        secrets = values.get("secrets")
        further = [*(secrets if isinstance(secrets, list) else []), values.get("webhook")]  # of the profile
        found |= {("Secret", secret["name"]) for secret in further if secret}
    elif isinstance(values, list):
        for item in values:
            found |= brought(item)
    return found


def references(docs: list[Doc]) -> Iterator[tuple[str, str, str, set[str]]]:
    """Who refers to which kind and name, and to which of its keys."""
    for pod in pods(docs):
        if account := pod.spec.get("serviceAccountName"):
            yield pod.title, "ServiceAccount", account, set()
        for secret in pod.spec.get("imagePullSecrets") or []:
            yield pod.title, "Secret", secret["name"], set()
        yield from _volumes(pod)
        for container in pod.containers():
            yield from _environment(pod.title, container)
    for account in named(docs, "ServiceAccount"):
        for secret in account.get("imagePullSecrets") or []:
            yield title(account), "Secret", secret["name"], set()
    for profile in configs(docs, PROFILE):
        yield from _profile(profile)


def _volumes(pod: Pod) -> Iterator[tuple[str, str, str, set[str]]]:
    for volume in pod.spec.get("volumes") or []:
        if "persistentVolumeClaim" in volume:
            yield pod.title, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], set()
        for source in (volume, *(volume.get("projected") or {}).get("sources", [])):
            for part, kind, key in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
                reference = source.get(part) or {}
                if reference and not reference.get("optional"):
                    name = reference.get(key) or reference["name"]
                    yield pod.title, kind, name, {item["key"] for item in reference.get("items") or []}


def _environment(where: str, container: Doc) -> Iterator[tuple[str, str, str, set[str]]]:
    for source in container.get("envFrom") or []:
        for part, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if part in source and not source[part].get("optional"):
                yield where, kind, source[part]["name"], set()
    for variable in container.get("env") or []:
        for part, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            reference = (variable.get("valueFrom") or {}).get(part)
            if reference and not reference.get("optional"):
                yield where, kind, reference["name"], {reference["key"]}


def _profile(profile: Doc) -> Iterator[tuple[str, str, str, set[str]]]:
    """What the pipeline's own pods will need."""
    for secret in profile.get("secrets") or []:
        if not secret.get("optional"):
            yield "profile", "Secret", secret["name"], set(secret["env"].values())
    for key in ("scratch", "model_cache"):
        if volume := profile.get(key):
            yield "profile", "PersistentVolumeClaim", volume["claim"], set()
    for name in profile.get("image_pull_secrets") or []:
        yield "profile", "Secret", name, set()
    if webhook := profile.get("webhook"):
        yield "profile", "Secret", webhook["name"], {webhook["key"]}


def missing(docs: list[Doc], values: Any) -> Iterator[str]:
    """Everything that is referred to exists, with the keys that are asked for."""
    keys = {("Secret", name): found for name, found in made(docs).items()}
    keys |= {(d["kind"], d["metadata"]["name"]): set(d.get("data") or {}) for d in docs}
    for pod in pods(docs):
        for claim in pod.owner["spec"].get("volumeClaimTemplates") or []:
            keys[("PersistentVolumeClaim", claim["metadata"]["name"])] = set()
    outside = brought(values) | GIVEN
    for where, kind, name, wanted in references(docs):
        if (kind, name) in outside:
            continue
        if (kind, name) not in keys:
            yield f"{where}: refers to {kind}/{name}, which is neither rendered nor named in the values"
        elif absent := sorted(wanted - keys[(kind, name)]):
            yield f"{where}: {kind}/{name} has no key {absent[0]}"


def unused(docs: list[Doc]) -> Iterator[str]:
    """Every ConfigMap, claim and account of the chart is used by somebody."""
    used = {(kind, name) for _, kind, name, _ in references(docs)}
    for binding in named(docs, "RoleBinding"):
        used |= {(subject["kind"], subject["name"]) for subject in binding.get("subjects") or []}
    for doc in docs:
        kinds = ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount")
        if labels(doc).get("app.kubernetes.io/component") in ELSEWHERE:
            continue
        if doc["kind"] in kinds and (doc["kind"], doc["metadata"]["name"]) not in used:
            yield f"{title(doc)}: nobody uses it"


def services(docs: list[Doc]) -> Iterator[str]:
    """A Service picks the pods of exactly one workload, and its ports are theirs."""
    for service in named(docs, "Service"):
        selector = service["spec"].get("selector")
        if not selector:
            yield f"{title(service)}: no selector"
            continue
        own = [pod for pod in pods(docs) if matches({"matchLabels": selector}, pod.labels)]
        if len(own) != 1 or not own[0].is_long_running:
            yield f"{title(service)}: picks {', '.join(pod.title for pod in own) or 'no pod'}"
            continue
        ports = [port for container in own[0].containers(init=False) for port in container.get("ports") or []]
        known = {key for port in ports for key in (port.get("name"), port["containerPort"])}
        for port in service["spec"]["ports"]:
            if port.get("targetPort", port["port"]) not in known:
                yield f"{title(service)}: targetPort {port.get('targetPort')} is no port of {own[0].title}"


def selectors(docs: list[Doc]) -> Iterator[str]:
    """Every selector picks something: a workload its own pods, a budget and a policy some pods of the chart or pipeline."""
    every = [pod.labels for pod in pods(docs)]
    every += [profile.get("labels") or {} for profile in configs(docs, PROFILE)]
    for doc in docs:
        spec = doc.get("spec") or {}
        if doc["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
            if not matches(spec["selector"], labels(spec["template"])):
                yield f"{title(doc)}: does not select its own pods"
            others = [p for p in pods(docs) if p.owner is not doc and matches(spec["selector"], p.labels)]
            for pod in others:
                yield f"{title(doc)}: selects the pods of {pod.title}"
        if doc["kind"] == "PodDisruptionBudget" and not any(matches(spec["selector"], own) for own in every):
            yield f"{title(doc)}: selects no pod"
        if doc["kind"] == "NetworkPolicy" and not any(matches(spec["podSelector"], own) for own in every):
            yield f"{title(doc)}: selects no pod"


def ingresses(docs: list[Doc]) -> Iterator[str]:
    """An Ingress leads to ports that Services have."""
    for ingress in named(docs, "Ingress"):
        for rule in ingress["spec"].get("rules") or []:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                found = next(named(docs, "Service", backend["name"]), None)
                ports = found["spec"]["ports"] if found else []
                if not any(backend["port"] in ({"name": p.get("name")}, {"number": p["port"]}) for p in ports):
                    yield f"{title(ingress)}: leads to {backend}, which is no port of a Service"


def hook_order(docs: list[Doc]) -> Iterator[str]:
    """What a pre-install hook needs is there before it: a hook itself, of the same event and a lower weight."""

    def weight(doc: Doc) -> int:
        return int((doc["metadata"].get("annotations") or {}).get("helm.sh/hook-weight", "0"))

    for pod in pods(docs):
        before = hooks(pod.owner) & {"pre-install", "pre-upgrade"}
        for _, kind, name, _ in references([pod.owner]) if before else ():
            other = next(named(docs, kind, name), None)
            if other is None or kind == "Secret":
                continue
            if not before <= hooks(other) or weight(other) >= weight(pod.owner):
                yield f"{pod.title}: runs before {title(other)} is there"
        for binding in named(docs, "RoleBinding") if before else ():
            names = {subject["name"] for subject in binding.get("subjects") or []}
            if pod.spec.get("serviceAccountName") in names and (
                not before <= hooks(binding) or weight(binding) >= weight(pod.owner)
            ):
                yield f"{pod.title}: runs before {title(binding)} is there"


RULES = [unused, services, selectors, ingresses, hook_order]
