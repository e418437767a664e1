"""Stage configurations: plain dataclasses in which every field says what it is to the result.

`selectmoe STAGE key=value ...` composes them with Hydra (`selectmoe.cli`); `load` builds one from a mapping, strictly.

A field has one of four roles:

* *identity*: changes the result, hence part of the output's identity;
* *execution*: where, when and by how many; never part of an identity;
* *input*: a path to something with an identity of its own, which counts in the path's place;
* *group*: a nested dataclass of such fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

from selectmoe.errors import UserError

MISSING: Any = "???"
"""What a required key holds until somebody gives it (OmegaConf's own mark)."""

C = TypeVar("C", bound="Config")


def _field(role: str, default: Any, doc: str) -> Any:
    metadata = {"role": role, "doc": doc}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def identity(default: Any = MISSING, *, doc: str) -> Any:
    """A field that changes the result. `doc` says why one would change it; it is the text of ``--help``."""
    return _field("identity", default, doc)


def execution(default: Any = MISSING, *, doc: str) -> Any:
    """A field that does not change the result: a path, a number of workers, logging."""
    return _field("execution", default, doc)


def input_(default: Any = MISSING, *, doc: str) -> Any:
    """A path to an input. Required unless a default (``""`` or ``[]``: absent) is given."""
    return _field("input", default, doc)


def group(cls: type, *, doc: str = "") -> Any:
    """A nested dataclass of fields."""
    return field(default_factory=cls, metadata={"role": "group", "doc": doc or (cls.__doc__ or "")})


class Config(Protocol):
    """A dataclass of such fields: a stage's, or a tool's."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> None:
        """Check the values that no type can check."""


@dataclass
class StageConfig:
    """What every stage has."""

    output_dir: str = execution(MISSING, doc="folder to write; refused when it holds another run's output")
    work_root: str = execution("", doc="folder or s3:// URI for committed progress; default OUTPUT_DIR/.work")
    seed: int = identity(42, doc="seed of everything random in this stage")
    threads: int = execution(0, doc="CPU threads; 0: all cores that this process may use")

    def validate(self) -> None:
        """Check the values that no type can check.

        Raises:
            UserError: a value is out of its range.
        """


@dataclass(frozen=True)
class Leaf:
    """One field that holds a value: its dotted name, role, doc, type and default."""

    name: str
    role: str
    doc: str
    type: Any
    default: Any


def leaves(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """Every value field of a configuration class, groups opened, in the order of definition."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            yield from leaves(hints[f.name], name + ".")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        yield Leaf(name, f.metadata["role"], f.metadata["doc"], hints[f.name], default)


def values(config: Any, *roles: str) -> dict[str, Any]:
    """The fields of the given roles as a nested dict (empty groups left out)."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata["role"] == "group":
            inner = values(value, *roles)
            if inner:
                out[f.name] = inner
        elif f.metadata["role"] in roles:
            out[f.name] = list(value) if isinstance(value, list | tuple) else value
    return out


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def build(cls: type[C], mapping: Mapping[str, Any]) -> C:
    """A configuration object from a complete or partial nested mapping, types checked by OmegaConf.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(mapping)))
        container = OmegaConf.to_container(merged, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, cls)) from None
    config: C = _construct(cls, container)
    return config


def _construct(cls: Any, container: Any) -> Any:
    hints = get_type_hints(cls)
    kwargs = {
        name: _construct(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in container.items()
    }
    return cls(**kwargs)


def load(cls: type[C], mapping: Mapping[str, Any] | str, **paths: Any) -> C:
    """A validated configuration from a mapping (or its JSON) plus paths under dotted names.

    Raises:
        UserError: an unknown key, a wrong type, a required key that is missing, or a value out of range.
    """
    nested: dict[str, Any] = json.loads(mapping) if isinstance(mapping, str) else json.loads(json.dumps(mapping))
    for name, value in paths.items():
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    config = build(cls, nested)
    require(config)
    config.validate()
    return config


def require(config: Config) -> None:
    """Raise `UserError` when a required key of the configuration has not been given."""
    flat = flatten(values(config, "identity", "execution", "input"))
    docs = {leaf.name: leaf.doc for leaf in leaves(type(config))}
    chained = tuple(
        f.name + "." for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), StageConfig)
    )
    for name, value in flat.items():
        if chained and name.startswith(chained):  # a stage of a chain gets its paths later
            continue
        if value == MISSING or (isinstance(value, list) and MISSING in value):
            raise UserError(f"{name}= is missing ({docs[name]})")


def explain(error: Exception, cls: type) -> str:
    """One line for an OmegaConf or Hydra error: what, where, what would be right."""
    known = [leaf.name for leaf in leaves(cls)]
    key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
    text = str(error).splitlines()[0]
    if key and key not in known and not any(name.startswith(key + ".") for name in known):
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known[:6]
        return f"unknown key {key!r}; nearest known: {', '.join(near)} (--help lists all)"
    return f"{key}: {text}" if key else text
