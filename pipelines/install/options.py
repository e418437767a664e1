"""The `key=value` words of the chart's commands as a dataclass, read strictly. No command runs this module."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from pipelines.kfp_api import Server
from pipelines.submit import typed
from selectmoe.errors import UserError

KINDS: dict[Any, str] = {str: "STRING", int: "NUMBER_INTEGER", list[str]: "LIST"}
REST = "words"
"""A field of this name takes the words that no other field takes."""
T = TypeVar("T")


def option(doc: str, default: Any = None) -> Any:
    """A key that a command takes.

    Args:
        doc: what it is.
        default: its value where it is not given; None: it must be given.
    """
    given = {} if default is None else {"default": default}
    return field(**given, metadata={"doc": doc})


def options(doc: str) -> Any:
    """A key whose value is a list."""
    return field(default_factory=list, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the API of Kubeflow Pipelines is, and who asks it."""

    endpoint: str = option("URL of the KFP API; default KF_PIPELINES_ENDPOINT, in a pod the cluster's own", "")
    namespace: str = option("namespace of a Kubeflow with several users; in a pod its own", "")
    token_file: str = option("file with a bearer token; default KF_PIPELINES_TOKEN, in a pod its own token", "")
    ca_file: str = option("certificates that vouch for the endpoint; default the public ones", "")

    def server(self) -> Server:
        """The API, which has answered.

        Raises:
            UserError: no endpoint, a token that cannot be read, or the API refuses.
            Unavailable: it does not answer.
        """
        return Server(self.endpoint, self.namespace, self.token_file, self.ca_file)


WAIT = "seconds that a server which is not up yet is waited for"


def read(cls: type[T], words: Sequence[str]) -> T:
    """The words of a command.

    Args:
        cls: a dataclass of `option`s.
        words: of the form key=value.

    Raises:
        UserError: an unknown word, a wrong value, or a key that is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds, given = get_type_hints(cls), {}
    rest: list[str] = []
    for word in words:
        key, sign, value = word.partition("=")
        if key in fields and key != REST and sign:
            given[key] = typed(key, value, KINDS[kinds[key]])
        elif REST in fields:
            rest.append(word)
        elif not sign:
            raise UserError(f"{word!r} is not of the form key=value")
        else:
            near = difflib.get_close_matches(key, fields, n=2, cutoff=0.5) or list(fields)
            raise UserError(f"unknown key {key!r}; nearest: {', '.join(near)} (--help lists all)")
    required = [f.name for f in fields.values() if dataclasses.MISSING is f.default is f.default_factory]
    missing = [name for name in required if not given.get(name) and name != REST]
    if missing:
        raise UserError(f"missing: {', '.join(f'{name}=' for name in missing)}")
    if given.get("wait", 0) < 0:
        raise UserError(f"wait={given['wait']} must be seconds, 0 or more")
    return cls(**given, **({REST: tuple(rest)} if REST in fields else {}))


def usage(name: str, what: str, cls: type[Any]) -> str:
    """The text of `--help`: every key with its default and meaning."""
    lines = [f"usage: python -m pipelines.install {name} key=value ...", "", what, ""]
    for item in dataclasses.fields(cls):
        default = "must be given" if dataclasses.MISSING is item.default is item.default_factory else item.default
        shown = "none" if default in ("", (), dataclasses.MISSING) else default
        lines.append(f"  {item.name}\n      {item.metadata['doc']} [{shown}]")
    return "\n".join(lines)
