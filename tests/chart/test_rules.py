"""Every rule finds what it is there for: good.yaml keeps them all, and each change here breaks one.

.venv/bin/python -m pytest tests/chart/test_rules.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rules
import secrecy
import upgrade
from manifests import Doc, parse, title

GOOD: list[Doc] = parse((Path(__file__).parent / "good.yaml").read_text(encoding="utf-8"))[0]
VALUES = {
    "networkPolicy": {"enabled": True},
    "database": {"existingSecret": {"name": "brought"}},
    "imagePullSecrets": [{"name": "registry"}],
}
GONE = object()
WEB = "Deployment/r-web spec template spec "
MAIN = WEB + "containers 0 "
LABELS = {"app.kubernetes.io/name": "demo", "app.kubernetes.io/instance": "r"}
ANY = {"matchLabels": LABELS | {"app.kubernetes.io/component": "nobody"}}

BROKEN: dict[str, list[tuple[str, Any, str]]] = {
    "workloads": [
        (MAIN + "resources limits cpu", GONE, "Deployment/r-web: container web: no limit of cpu"),
        (MAIN + "resources requests memory", GONE, "no request of memory"),
        (MAIN + "resources limits memory", "512Mi", "asks for 1Gi of memory, more than its limit 512Mi"),
        (MAIN + "startupProbe", GONE, "no startupProbe"),
        (MAIN + "livenessProbe", GONE, "no livenessProbe"),
        (MAIN + "readinessProbe", {"httpGet": {"port": 5001}}, "asks port 5001"),
        ("PodDisruptionBudget/r-web spec selector", ANY, "2 replicas and 0 PodDisruptionBudgets"),
        ("PodDisruptionBudget/r-web spec maxUnavailable", 0, "lets no pod go"),
        ("PodDisruptionBudget/r-web spec", {"minAvailable": 2, "selector": {"matchLabels": LABELS}}, "lets no pod go"),
        ("Deployment/r-web spec replicas", 1, "one replica must not have PodDisruptionBudget/r-web"),
        ("Job/r-secrets spec activeDeadlineSeconds", GONE, "no activeDeadlineSeconds"),
        ("Job/r-secrets spec template spec restartPolicy", "Always", "restartPolicy"),
        ("Job/r-upload metadata annotations helm.sh/hook-delete-policy", "before-hook-creation", "stays after it"),
        ("Job/r-upload metadata annotations helm.sh/hook-delete-policy", "hook-succeeded", "without before-hook"),
        ("CronJob/r-gc spec concurrencyPolicy", "Allow", "concurrencyPolicy must be Forbid"),
        ("CronJob/r-gc spec failedJobsHistoryLimit", GONE, "no failedJobsHistoryLimit"),
        ("CronJob/r-gc spec jobTemplate spec backoffLimit", GONE, "CronJob/r-gc: no backoffLimit"),
        (MAIN + "securityContext readOnlyRootFilesystem", False, "readOnlyRootFilesystem must be true"),
        (WEB + "volumes 1 emptyDir", {}, "emptyDir without sizeLimit"),
        (WEB + "volumes 1 name", "temporary", "mounts tmp, which the pod does not have"),
        (WEB + "volumes 1 name", "temporary", "volume temporary is mounted nowhere"),
        (MAIN + "volumeMounts 1 mountPath", "/etc/demo", "two volumes at one path"),
        ("Deployment/r-web spec template metadata annotations", {}, "reads r-config and has no checksum/"),
        (WEB + "volumes 1", {"name": "tmp", "persistentVolumeClaim": {"claimName": "r-data"}}, "must be Recreate"),
    ],
    "objects": [
        ("Service/r-web metadata labels app.kubernetes.io/part-of", GONE, "no label app.kubernetes.io/part-of"),
        ("Service/r-web metadata labels helm.sh/chart", GONE, "no label helm.sh/chart"),
        ("Service/r-web metadata labels helm.sh/chart", "demo 1", "'demo 1' is no label"),
        ("Service/r-web metadata labels app.kubernetes.io/version", 1, "version=1 is no label"),
        ("Service/r-web metadata name", "r_web", "not a name"),
        ("CronJob/r-gc metadata name", "r" * 60, "(60 characters)"),
        ("Service/r-web metadata annotations", {"on": True}, "on=True is no annotation"),
        ("Ingress/r-web metadata namespace", "elsewhere", "lies in elsewhere"),
        ("Role/r-secrets kind", "ClusterRole", "is cluster-wide"),
        ("ServiceAccount/r-secrets metadata name", "r-web", "ServiceAccount/r-web: 2 times"),
        (MAIN + "env 1 name", "PGPASSWORD", "env PGPASSWORD 2 times"),
        (MAIN + "image", None, "containers[0].image is null"),
        (MAIN + "image", "example.org/web:<no value>", "was not rendered"),
        ("ConfigMap/r-config data auth.ini", "name = {{ .Values.name }}", "was not rendered"),
        ("Service/r-web spec selector app.kubernetes.io/version", "1", "selects by app.kubernetes.io/version"),
        ("Service/r-web spec selector app.kubernetes.io/instance", GONE, "does not select by app.kubernetes.io/inst"),
    ],
    "wiring": [
        ("ConfigMap/r-config metadata name", "r-other", "refers to ConfigMap/r-config, which is neither"),
        ("ConfigMap/r-config metadata name", "r-other", "ConfigMap/r-other: nobody uses it"),
        (MAIN + "env 0 valueFrom secretKeyRef key", "passwort", "Secret/r-made has no key passwort"),
        (MAIN + "env 1 valueFrom secretKeyRef name", "forgotten", "refers to Secret/forgotten"),
        (WEB + "serviceAccountName", "r-wep", "refers to ServiceAccount/r-wep"),
        (WEB + "imagePullSecrets 0 name", "registries", "refers to Secret/registries"),
        (
            "ConfigMap/r-profile data profile.yaml",
            "scratch: {claim: nowhere, mount: /x}",
            "PersistentVolumeClaim/nowhere",
        ),
        (
            "ConfigMap/r-profile data profile.yaml",
            "secrets: [{name: r-made, env: {A: b}}]",
            "Secret/r-made has no key b",
        ),
        ("Service/r-web spec selector app.kubernetes.io/component", "wep", "Service/r-web: picks no pod"),
        ("Service/r-web spec selector", LABELS, "Service/r-web: picks Deployment/r-web, "),
        ("Service/r-web spec ports 0 targetPort", "https", "targetPort https is no port of Deployment/r-web"),
        ("Deployment/r-web spec selector", ANY, "does not select its own pods"),
        ("Deployment/r-web spec selector", {"matchLabels": LABELS}, "selects the pods of CronJob/r-gc"),
        ("NetworkPolicy/r-web spec podSelector", ANY, "NetworkPolicy/r-web: selects no pod"),
        ("PodDisruptionBudget/r-web spec selector", ANY, "PodDisruptionBudget/r-web: selects no pod"),
        ("Ingress/r-web spec rules 0 http paths 0 backend service port", {"number": 81}, "is no port of a Service"),
        ("ConfigMap/r-secrets metadata annotations", {}, "runs before ConfigMap/r-secrets is there"),
        (
            "RoleBinding/r-secrets metadata annotations helm.sh/hook-weight",
            "0",
            "before RoleBinding/r-secrets is there",
        ),
    ],
    "rights": [
        ("Role/r-secrets rules 0 verbs", ["*"], "wildcard in verbs"),
        ("Role/r-secrets rules 0 resources", ["*"], "wildcard in resources"),
        ("Role/r-secrets rules 0 verbs", ["create", "list"], "list of secrets"),
        ("Role/r-secrets rules 1 resourceNames", GONE, "get, patch of secrets without resourceNames"),
        ("Role/r-secrets rules 1 verbs", ["create"], "create with resourceNames is never granted"),
        ("Role/r-secrets rules 0", {"resources": ["roles"], "verbs": ["escalate"]}, "escalate"),
        ("Role/r-secrets rules 0 resources", ["pods/exec"], "pods/exec"),
        ("RoleBinding/r-secrets roleRef kind", "ClusterRole", "ClusterRole/r-secrets is not of this rendering"),
        ("RoleBinding/r-secrets roleRef name", "admin", "Role/r-secrets: bound to nobody"),
        ("RoleBinding/r-secrets subjects 0 name", "default", "rights for ServiceAccount/default"),
        (WEB + "automountServiceAccountToken", GONE, "has a token and no rights"),
        (WEB + "serviceAccountName", GONE, "runs as the namespace's default account"),
        ("ServiceAccount/r-web automountServiceAccountToken", True, "pods ask for it themselves"),
    ],
    "network": [
        ("NetworkPolicy/r-deny spec policyTypes", ["Ingress"], "Deployment/r-web: no default-deny policy of Egress"),
        ("NetworkPolicy/r-deny spec podSelector", {}, "selects every pod of the namespace"),
        ("NetworkPolicy/r-web spec ingress", [{}], "NetworkPolicy/r-web: allows all ingress"),
        ("NetworkPolicy/r-web spec ingress 0 from", GONE, "any pod of the namespace reaches port http"),
        ("NetworkPolicy/r-web spec egress 0 ports", GONE, "allows egress to every port"),
        ("NetworkPolicy/r-names spec egress 0 ports 0 protocol", "TCP", "cannot ask for names"),
        ("NetworkPolicy/r-store spec ingress 0 ports 0 port", 8888, "Service/r-store: port 8333 is open to nobody"),
    ],
    "secrecy": [
        ("ConfigMap/r-config kind", "Secret", "a Secret in the rendering"),
        (MAIN + "env 0", {"name": "PGPASSWORD", "value": "x"}, "PGPASSWORD is written out"),
        ("ConfigMap/r-config data auth.ini", "postgresql://user:pass@host/db", "a login in an address"),
        ("ConfigMap/r-config data auth.ini", "key = wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY", "a random word"),
        ("ConfigMap/r-config data tls.key", "-----BEGIN PRIVATE KEY-----", "a private key"),
    ],
    "uninstall": [
        ("PersistentVolumeClaim/r-data metadata annotations", {}, "helm.sh/resource-policy: keep is missing"),
        ("ConfigMap/r-config metadata annotations", {"helm.sh/resource-policy": "keep"}, "is kept, and holds no data"),
        ("ServiceAccount/r-secrets metadata annotations helm.sh/hook-delete-policy", GONE, "stays after an uninstall"),
        ("StatefulSet/r-store spec volumeClaimTemplates", [{"metadata": {"name": "x"}}], "its claims stay after"),
    ],
}
UPGRADES: list[tuple[str, Any, str]] = [
    ("Deployment/r-web spec selector", ANY, "Deployment/r-web: spec.selector cannot be changed"),
    ("StatefulSet/r-store spec serviceName", "other", "spec.serviceName cannot be changed"),
    ("PersistentVolumeClaim/r-data spec storageClassName", "fast", "spec.storageClassName cannot be changed"),
    ("PersistentVolumeClaim/r-data spec resources requests storage", "5Gi", "a claim cannot shrink"),
    ("PersistentVolumeClaim/r-data metadata annotations", {}, "is no longer kept"),
    ("StatefulSet/r-store metadata name", "r-storage", "StatefulSet/r-store: is gone"),
    ("RoleBinding/r-secrets metadata annotations", {}, ""),
    ("ConfigMap/r-secrets data secrets.yaml", "secrets: []", "Secret/r-made: password is no longer there"),
]


def changed(place: str, value: Any) -> list[Doc]:
    """The good release with one field changed."""
    name, *path = place.split(" ")
    docs = json.loads(json.dumps(GOOD))  # deepcopy would keep what YAML's anchors share
    at: Any = next(doc for doc in docs if title(doc) == name)
    *parents, last = [int(key) if key.isdigit() else key for key in path]
    for key in parents:
        at = at[key]
    if value is GONE:
        del at[last]
    else:
        at[last] = value
    return docs


def test_the_good_release_keeps_every_rule() -> None:
    assert not list(rules.findings(GOOD, VALUES, "ns"))


@pytest.mark.parametrize(("place", "value", "said"), [case for cases in BROKEN.values() for case in cases])
def test_a_broken_rule_is_found(place: str, value: Any, said: str) -> None:
    found = list(rules.findings(changed(place, value), VALUES, "ns"))
    assert any(said in line for line in found), found


@pytest.mark.parametrize(("place", "value", "said"), UPGRADES)
def test_an_upgrade_that_cannot_be_made_is_found(place: str, value: Any, said: str) -> None:
    found = list(upgrade.changes(GOOD, changed(place, value)))
    assert any(said in line for line in found) if said else not found, found


def test_an_upgrade_may_change_what_can_be_changed() -> None:
    for place, value in [
        ("Deployment/r-web spec replicas", 3),
        (MAIN + "image", "example.org/web:2"),
        ("PersistentVolumeClaim/r-data spec resources requests storage", "20Gi"),
        ("Job/r-secrets spec template spec restartPolicy", "OnFailure"),
    ]:
        assert not list(upgrade.changes(GOOD, changed(place, value)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"database": {"password": ""}}, "database.password: looks like a place for a password"),
        ({"auth": {"token": "x"}}, "auth.token"),
        ({"database": {"uri": "postgresql://a:b@c/d"}}, "a login in an address"),
        ({"existingSecret": {"name": "x", "passwordKey": "password"}, "secrets": {"create": True}}, ""),
    ],
)
def test_values_are_no_place_for_passwords(values: Any, said: str) -> None:
    found = list(secrecy.values(values))
    assert any(said in line for line in found) if said else not found


def test_a_key_twice_is_refused() -> None:
    with pytest.raises(Exception, match="key 'a' twice"):
        parse("{a: 1, a: 2}")
