"""Strict validation against the schemas of several Kubernetes versions. No command; the tests here use it.

The schemas are kubernetes-validate's; each document is checked once for each version, however many renderings hold it,
and a version's definitions (2 MB) are read once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import referencing
from jsonschema import Draft202012Validator
from manifests import Doc, title

VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
FOLDER = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


@functools.cache
def _definitions(version: str) -> Any:
    contents = json.loads((FOLDER / f"v{version}.0-local-strict" / "_definitions.json").read_text(encoding="utf-8"))
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Draft202012Validator | None:
    api = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    path = FOLDER / f"v{version}.0-local-strict" / f"{kind.lower()}-{api}.json"
    if not path.is_file():
        return None
    schema = json.loads(path.read_text(encoding="utf-8"))
    return Draft202012Validator(schema, registry=referencing.Resource.from_contents(schema) @ _definitions(version))


@functools.cache
def _errors(version: str, text: str) -> list[str]:
    doc = json.loads(text)
    validator = _validator(version, doc["apiVersion"], doc["kind"])
    if validator is None:
        return [f"{title(doc)}: Kubernetes {version} has no {doc['kind']} of {doc['apiVersion']}"]
    return [
        f"{title(doc)}: Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message[:200]}"
        for error in validator.iter_errors(doc)
    ]


def findings(docs: Iterable[Doc], versions: Iterable[str] = VERSIONS) -> Iterator[str]:
    """What the API servers of these versions would not take."""
    for version in versions:
        for doc in docs:
            yield from _errors(version, json.dumps(doc, sort_keys=True))
