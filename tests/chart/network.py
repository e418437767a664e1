"""What NetworkPolicies let through: a small simulator of their semantics, and the rules that use it.

No command; test_rules.py breaks each rule once. A connection needs both ends: the client's policies must let it out
(egress), the server's in (ingress). A pod that no policy selects for a direction is open in it; one that some select may
do what any of them allows.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from manifests import Doc, Pod, matches, named, pods, title
from wiring import PROFILE, configs

HERE = "research"
"""The release's namespace, unless told otherwise: not that of Kubeflow Pipelines."""


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or an address outside the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    """Its namespace; empty: the release's."""
    address: str = ""
    """An IP address outside; empty: a pod."""
    ports: dict[str, int] = field(default_factory=dict)
    """Named ports of the pod."""


def end(pod: Pod) -> End:
    """A pod as an end of connections."""
    every = [port for container in pod.containers() for port in container.get("ports") or []]
    return End(pod.labels, ports={port["name"]: port["containerPort"] for port in every if "name" in port})


def pipeline(docs: list[Doc]) -> End | None:
    """A pod of the pipeline, which KFP starts: it is known by the labels that the site's profile gives it."""
    profiles = configs(docs, PROFILE)
    return End(profiles[0].get("labels") or {}) if profiles else None


def types(policy: Doc) -> set[str]:
    """The directions that a policy closes."""
    spec = policy["spec"]
    return set(spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])])


def allows(docs: Iterable[Doc], client: End, server: End, port: int, protocol: str = "TCP", here: str = HERE) -> bool:
    """Whether the policies of a rendering let a connection be made."""
    policies = list(named(docs, "NetworkPolicy"))
    for direction, own, peer in (("Egress", client, server), ("Ingress", server, client)):
        if own.address or own.namespace not in ("", here):
            continue  # nothing of ours decides there
        selecting = [p for p in policies if direction in types(p) and matches(p["spec"]["podSelector"], own.labels)]
        rules = [rule for p in selecting for rule in p["spec"].get(direction.lower()) or []]
        if selecting and not any(_rule(rule, direction, peer, server, port, protocol, here) for rule in rules):
            return False
    return True


def _rule(rule: Doc, direction: str, peer: End, server: End, port: int, protocol: str, here: str) -> bool:
    peers = rule.get("to" if direction == "Egress" else "from")
    ports = rule.get("ports")
    return (not peers or any(_peer(one, peer, here) for one in peers)) and (
        not ports or any(_port(one, server, port, protocol) for one in ports)
    )


def _peer(one: Doc, peer: End, here: str) -> bool:
    if block := one.get("ipBlock"):
        address = peer.address and ipaddress.ip_address(peer.address)
        return (
            bool(address)
            and _inside(address, block["cidr"])
            and not any(_inside(address, cidr) for cidr in block.get("except") or [])
        )
    if peer.address:
        return False
    spaces = one.get("namespaceSelector")
    named_so = {"kubernetes.io/metadata.name": peer.namespace or here}
    if not (matches(spaces, named_so) if spaces is not None else peer.namespace in ("", here)):
        return False
    return "podSelector" not in one or matches(one["podSelector"], peer.labels)


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address, cidr: str) -> bool:
    return address in ipaddress.ip_network(cidr)


def _port(one: Doc, server: End, port: int, protocol: str) -> bool:
    if one.get("protocol", "TCP") != protocol:
        return False
    wanted = one.get("port")
    number = server.ports.get(wanted, -1) if isinstance(wanted, str) else wanted
    return number is None or number == port or number < port <= one.get("endPort", -1)


STRANGERS = {"any pod of the namespace": End({"app": "stranger"}), "any pod of the cluster": End(namespace="stranger")}
OUTSIDE = End(address="203.0.113.7")
DNS = End({"k8s-app": "kube-dns"}, namespace="kube-system")


def default_deny(docs: list[Doc]) -> Iterator[str]:
    """Every pod of the chart is closed in both directions; what is open is named."""
    for pod in pods(docs):
        for direction in ("Ingress", "Egress"):
            closing = [
                policy
                for policy in named(docs, "NetworkPolicy")
                if direction in types(policy)
                and not policy["spec"].get(direction.lower())
                and matches(policy["spec"]["podSelector"], pod.labels)
            ]
            if not closing:
                yield f"{pod.title}: no default-deny policy of {direction}"
    for policy in named(docs, "NetworkPolicy"):
        if matches(policy["spec"]["podSelector"], {}):
            yield f"{title(policy)}: selects every pod of the namespace, others' too"
        for key in ("ingress", "egress"):
            for rule in policy["spec"].get(key) or []:
                if not rule:
                    yield f"{title(policy)}: allows all {key}"
                elif key == "egress" and not rule.get("ports"):
                    yield f"{title(policy)}: allows egress to every port"


def strangers(docs: list[Doc]) -> Iterator[str]:
    """A pod of somebody else reaches nothing; everybody of ours can ask for names."""
    for pod in pods(docs):
        own = end(pod)
        for name, port in own.ports.items():
            for who, stranger in STRANGERS.items():
                if allows(docs, stranger, own, port):
                    yield f"{pod.title}: {who} reaches port {name}"
        if not allows(docs, own, DNS, 53, "UDP") or not allows(docs, own, DNS, 53):
            yield f"{pod.title}: cannot ask for names"


def reachable(docs: list[Doc]) -> Iterator[str]:
    """Every port of every Service is open to somebody, by a rule that names the port."""
    for service in named(docs, "Service"):
        for pod in pods(docs):
            if (
                not matches({"matchLabels": service["spec"].get("selector") or {}}, pod.labels)
                or not pod.is_long_running
            ):
                continue
            own = end(pod)
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                number = own.ports.get(target, -1) if isinstance(target, str) else target
                rules = [
                    rule
                    for policy in named(docs, "NetworkPolicy")
                    if "Ingress" in types(policy) and matches(policy["spec"]["podSelector"], own.labels)
                    for rule in policy["spec"].get("ingress") or []
                ]
                if not any(_port(one, own, number, "TCP") for rule in rules for one in rule.get("ports") or []):
                    yield f"{title(service)}: port {port['port']} is open to nobody"


RULES = [default_deny, strangers, reachable]
