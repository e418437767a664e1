"""Rules about what runs: requests and limits, probes, disruption budgets, jobs' ends, file systems, checksums.

No command; test_rules.py breaks each rule once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal

from manifests import Doc, Pod, annotations, hooks, matches, named, pods, title

UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]*)")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def quantity(value: object) -> Decimal:
    """A quantity of Kubernetes as a number.

    Raises:
        ValueError: it is none.
    """
    match = QUANTITY.fullmatch(str(value))
    if not match or match[2] not in UNITS:
        raise ValueError(f"{value!r} is not a quantity")
    return Decimal(match[1]) * UNITS[match[2]]


def resources(docs: Iterable[Doc]) -> Iterator[str]:
    """Every container asks for CPU and memory, is limited in both, and asks for no more than its limit."""
    for pod in pods(docs):
        for container in pod.containers():
            where = f"{pod.title}: container {container['name']}"
            given = container.get("resources") or {}
            for what in ("cpu", "memory"):
                request = (given.get("requests") or {}).get(what)
                limit = (given.get("limits") or {}).get(what)
                if request is None or limit is None:
                    yield f"{where}: no {'request' if request is None else 'limit'} of {what}"
                elif quantity(request) > quantity(limit):
                    yield f"{where}: asks for {request} of {what}, more than its limit {limit}"


def probes(docs: Iterable[Doc]) -> Iterator[str]:
    """Long-running containers have all three probes, of a port that the container names."""
    for pod in pods(docs):
        for container in pod.containers(init=False):
            where = f"{pod.title}: container {container['name']}"
            known = {key for port in container.get("ports") or [] for key in (port.get("name"), port["containerPort"])}
            for key in PROBES:
                probe = container.get(key)
                if probe is None and pod.is_long_running:
                    yield f"{where}: no {key}"
                action = (probe or {}).get("httpGet") or (probe or {}).get("tcpSocket")
                if action and action["port"] not in known:
                    yield f"{where}: {key} asks port {action['port']}, which the container does not have"


def disruption(docs: list[Doc]) -> Iterator[str]:
    """More than one replica: one budget that lets a pod go; one replica: none, it would hold up every drain."""
    budgets = list(named(docs, "PodDisruptionBudget"))
    for pod in pods(docs):
        if not pod.is_long_running or pod.owner["kind"] == "DaemonSet":
            continue
        replicas = pod.owner["spec"].get("replicas", 1)
        own = [budget for budget in budgets if matches(budget["spec"].get("selector"), pod.labels)]
        if replicas > 1 and len(own) != 1:
            yield f"{pod.title}: {replicas} replicas and {len(own)} PodDisruptionBudgets"
        if replicas <= 1 and own:
            yield f"{pod.title}: one replica must not have {title(own[0])}"
        for budget in own:
            spec = budget["spec"]
            least, most = spec.get("minAvailable"), spec.get("maxUnavailable")
            stuck = most in (0, "0%") or least == "100%" or (isinstance(least, int) and least >= replicas)
            if stuck or (least is None) == (most is None):
                yield f"{title(budget)}: lets no pod go, or says both or neither of minAvailable and maxUnavailable"


def jobs(docs: Iterable[Doc]) -> Iterator[str]:
    """A Job ends, is tried again a few times, and does not stay; a CronJob runs one at a time and forgets."""
    for doc in docs:
        if doc["kind"] not in ("Job", "CronJob"):
            continue
        spec = doc["spec"]
        job = spec["jobTemplate"]["spec"] if doc["kind"] == "CronJob" else spec
        for key in ("activeDeadlineSeconds", "backoffLimit"):
            if job.get(key) is None:
                yield f"{title(doc)}: no {key}"
        if job["template"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            yield f"{title(doc)}: restartPolicy must be Never or OnFailure"
        policy = annotations(doc).get("helm.sh/hook-delete-policy", "")
        if doc["kind"] == "Job" and "ttlSecondsAfterFinished" not in job and "hook-succeeded" not in policy:
            yield f"{title(doc)}: stays after it finished (ttlSecondsAfterFinished)"
        if doc["kind"] == "CronJob":
            if spec.get("concurrencyPolicy") != "Forbid":
                yield f"{title(doc)}: concurrencyPolicy must be Forbid"
            for key in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
                if spec.get(key) is None:
                    yield f"{title(doc)}: no {key}"


def hook_jobs(docs: Iterable[Doc]) -> Iterator[str]:
    """A hook can be run again by the next upgrade: what is left of the last one goes first."""
    for doc in docs:
        policy = annotations(doc).get("helm.sh/hook-delete-policy", "before-hook-creation")  # Helm's own default
        if hooks(doc) and "before-hook-creation" not in policy:
            yield f"{title(doc)}: hook without before-hook-creation"


def file_systems(docs: Iterable[Doc]) -> Iterator[str]:
    """Root file systems are read-only; mounts have a volume, volumes a mount; disks on the node have a limit."""
    for pod in pods(docs):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
        mounted = set()
        for container in pod.containers():
            where = f"{pod.title}: container {container['name']}"
            if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True:
                yield f"{where}: readOnlyRootFilesystem must be true"
            paths = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
            names = {mount["name"] for mount in container.get("volumeMounts") or []}
            mounted |= names
            if len(set(paths)) < len(paths):
                yield f"{where}: two volumes at one path"
            for name in sorted(names - set(volumes) - _claimed(pod)):
                yield f"{where}: mounts {name}, which the pod does not have"
        for name, volume in volumes.items():
            if name not in mounted:
                yield f"{pod.title}: volume {name} is mounted nowhere"
            if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
                yield f"{pod.title}: volume {name}: emptyDir without sizeLimit"


def _claimed(pod: Pod) -> set[str]:
    return {claim["metadata"]["name"] for claim in pod.owner["spec"].get("volumeClaimTemplates") or []}


def configs(pod: Pod) -> set[str]:
    """The ConfigMaps that a pod mounts or takes its environment from."""
    found = set()
    for volume in pod.spec.get("volumes") or []:
        sources = [volume, *(volume.get("projected") or {}).get("sources", [])]
        found |= {source["configMap"]["name"] for source in sources if "configMap" in source}
    for container in pod.containers():
        for source in container.get("envFrom") or []:
            found |= {source["configMapRef"]["name"]} if "configMapRef" in source else set()
        for variable in container.get("env") or []:
            if reference := (variable.get("valueFrom") or {}).get("configMapKeyRef"):
                found.add(reference["name"])
    return found


def checksums(docs: Iterable[Doc]) -> Iterator[str]:
    """A pod that goes on running over a change of its ConfigMap carries the ConfigMap's checksum."""
    for pod in pods(docs):
        marked = any(key.startswith("checksum/") for key in annotations(pod.template))
        if pod.is_long_running and configs(pod) and not marked:
            yield f"{pod.title}: reads {', '.join(sorted(configs(pod)))} and has no checksum/ annotation"


def stateful(docs: Iterable[Doc]) -> Iterator[str]:
    """One pod at a time where a volume can be held by one only: a Deployment with such a claim is recreated."""
    shared = {
        claim["metadata"]["name"]
        for claim in named(docs, "PersistentVolumeClaim")
        if "ReadWriteMany" in claim["spec"].get("accessModes", [])
    }
    for doc in named(docs, "Deployment"):
        volumes = doc["spec"]["template"]["spec"].get("volumes") or []
        claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
        if claims - shared and (doc["spec"].get("strategy") or {}).get("type") != "Recreate":
            yield f"{title(doc)}: strategy must be Recreate, its volume has room for one pod"
        if claims - shared and doc["spec"].get("replicas", 1) > 1:
            yield f"{title(doc)}: several replicas on a volume for one"


RULES = [resources, probes, disruption, jobs, hook_jobs, file_systems, checksums, stateful]
