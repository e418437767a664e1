"""All rules over one rendering. No command: test_rules.py tries them, test_renderings.py applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import network
import objects
import pod_security
import rights
import secrecy
import upgrade
import wiring
import workloads
from manifests import Doc


def findings(docs: list[Doc], values: Any, namespace: str, is_release: bool = True) -> Iterator[str]:
    """What is wrong with a rendering.

    Args:
        docs: its documents, hooks included.
        values: what it was rendered with, defaults included.
        namespace: where it goes.
        is_release: whether Helm installs it, and not kubectl.
    """
    for module in (workloads, objects, wiring, rights):
        for rule in module.RULES:
            yield from rule(docs)
    yield from pod_security.findings(docs)
    yield from objects.places(namespace, docs)
    yield from wiring.missing(docs, values)
    yield from secrecy.manifests(docs)
    if is_release:
        yield from objects.of_a_chart(docs)
        yield from upgrade.left_behind(docs)
        yield from upgrade.kept(docs)
    if (values.get("networkPolicy") or {}).get("enabled"):
        for rule in network.RULES:
            yield from rule(docs)
