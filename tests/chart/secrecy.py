"""Rules about what must not be readable: passwords in manifests, in values, in what helm prints.

No command; test_rules.py breaks each rule once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from manifests import Doc, pods, title, walk

PASSWORD = re.compile(
    r"(?i)(passw(or)?d|(?<!existing)(?<!tls)secret|token|credential|(access|secret|private|api)[_-]?key)s?$"
)
"""Names of values that would hold one; `existingSecret`, `tlsSecret`, `passwordKey` and the like say where one is."""
VARIABLE = re.compile(r"PASSW|SECRET_KEY|SECRET_ACCESS|ACCESS_KEY|TOKEN$|CREDENTIAL")
LOGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@")
WORD = re.compile(r"[A-Za-z0-9+/]{20,}")
HARMLESS = re.compile(r"[0-9a-f]{64}|([A-Za-z0-9]{0,12}/)*[A-Za-z0-9]{0,12}")
"""Digests and paths."""


def entropy(text: str) -> float:
    """Bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def material(text: str) -> Iterator[str]:
    """What in a text looks like a password: a login in an address, a long random word, a private key."""
    if match := LOGIN.search(text):
        yield f"a login in an address: {match[0][:12]}..."
    if "PRIVATE KEY" in text:
        yield "a private key"
    for word in WORD.findall(text):
        if entropy(word) > 3.8 and not HARMLESS.fullmatch(word) and re.search(r"\d", word):
            yield f"a random word: {word[:6]}..."


def manifests(docs: Iterable[Doc]) -> Iterator[str]:
    """No Secret with contents, no literal in a variable or field that holds a credential, nothing that looks random."""
    for doc in docs:
        if doc["kind"] == "Secret":
            yield f"{title(doc)}: a Secret in the rendering; the `secrets` Job makes them"
        for path, value in walk({key: doc[key] for key in doc if key != "kind"}):
            if isinstance(value, str):
                for finding in material(value):
                    yield f"{title(doc)}: {path}: {finding}"
    for pod in pods(docs):
        for container in pod.containers():
            for variable in container.get("env") or []:
                if VARIABLE.search(variable["name"]) and "value" in variable:
                    yield f"{pod.title}: {variable['name']} is written out; take it from a Secret"


def values(given: Any) -> Iterator[str]:
    """No value is a password: what is about one names a Secret or a key of it, or is a switch."""
    for path, value in walk(given):
        parent, _, name = path.rpartition(".")
        if PASSWORD.search(name) and isinstance(value, str) and not parent.endswith(".env"):  # variable: key
            yield f"{path}: looks like a place for a password"
        if isinstance(value, str):
            for finding in material(value):
                yield f"{path}: {finding}"
