"""A user's own Python in a run: import paths that the command line allowed, and no others.

No command runs this module. A custom loss or trash expert is named ``package.module:callable`` and works only where the
same command says so::

    selectmoe warmup ... selector_model.trash_expert=mine.experts:scaled allow_code=[mine.experts:scaled]

A checkpoint, an artifact or a bucket can name what it likes: nothing is imported on its word (docs/design.md).
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from selectmoe.errors import UserError

FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""``package.module:callable``."""

_allowed: dict[str, Callable[..., Any]] = {}


def names_code(value: str) -> bool:
    """Whether a value is meant as an import path: no name of ours holds a colon."""
    return ":" in value


def allow(paths: Iterable[str], key: str = "allow_code") -> None:
    """Import the callables that this process's command line allows; those of an earlier call are forgotten.

    Args:
        paths: each ``package.module:callable``, importable from here (PYTHONPATH).
        key: the configuration key that gave them, for messages.

    Raises:
        UserError: a path has another form, cannot be imported, or is nothing that can be called.
    """
    found = {path: _imported(path, key) for path in paths}
    _allowed.clear()
    _allowed.update(found)


def allowed(path: str) -> bool:
    """Whether this process's command line allows an import path."""
    return path in _allowed


def get(path: str, key: str) -> Callable[..., Any]:
    """The callable of an import path that was allowed.

    Args:
        path: ``package.module:callable``.
        key: the configuration key that names it, for messages.

    Raises:
        UserError: the command line has not allowed it.
    """
    if not allowed(path):
        raise UserError(
            f"{key}={path} names code, which runs only where the command line says so: add allow_code=[{path}]"
        )
    return _allowed[path]


def source_digest(path: str) -> str:
    """SHA-256 (hex) of the source file that an import path lies in: what a result depends on; of the path where there is none."""
    file = getattr(importlib.import_module(path.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else path.encode()).hexdigest()


def _imported(path: str, key: str) -> Callable[..., Any]:
    if not FORM.fullmatch(path):
        raise UserError(f"{key}: {path!r} is not of the form package.module:callable")
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{key}: {path} cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise UserError(f"{key}: {path} is a {type(found).__name__}, not a callable")
    imported: Callable[..., Any] = found
    return imported
