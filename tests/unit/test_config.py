"""pytest tests/unit/test_config.py"""

from dataclasses import dataclass

import pytest

from selectmoe.config import StageConfig, execution, flatten, group, identity, input_, leaves, load, values
from selectmoe.errors import UserError


@dataclass
class Inner:
    rate: float = identity(0.1, doc="a rate")
    workers: int = execution(1, doc="workers")


@dataclass
class Outer(StageConfig):
    data: str = input_(doc="rows")
    more: list[str] = input_([], doc="more rows")
    names: list[str] = identity(["a"], doc="names")
    inner: Inner = group(Inner)

    def validate(self) -> None:
        if self.inner.rate <= 0:
            raise UserError("inner.rate must be above 0")


def test_roles_are_told_apart():
    config = load(Outer, {"inner": {"rate": 0.5}}, data="x", output_dir="o")
    assert values(config, "identity") == {"seed": 42, "names": ["a"], "inner": {"rate": 0.5}}
    assert flatten(values(config, "execution"))["inner.workers"] == 1
    assert values(config, "input") == {"data": "x", "more": []}


def test_dotted_paths_reach_nested_fields():
    config = load(Outer, {}, **{"data": "x", "output_dir": "o", "inner.workers": 3})
    assert config.inner.workers == 3


@pytest.mark.parametrize(
    ("mapping", "paths", "words"),
    [
        ({"nmaes": ["b"]}, {"data": "x", "output_dir": "o"}, ["nmaes", "names"]),
        ({"inner": {"rate": "fast"}}, {"data": "x", "output_dir": "o"}, ["rate", "fast"]),
        ({"inner": {"rate": 0}}, {"data": "x", "output_dir": "o"}, ["inner.rate"]),
        ({}, {"output_dir": "o"}, ["data=", "missing"]),
        ({}, {"data": "x"}, ["output_dir=", "missing"]),
    ],
)
def test_bad_input_is_named(mapping, paths, words):
    with pytest.raises(UserError) as error:
        load(Outer, mapping, **paths)
    assert all(word in str(error.value) for word in words)


def test_defaults_are_not_shared():
    one, two = (load(Outer, {}, data="x", output_dir="o") for _ in range(2))
    one.names.append("b")
    assert two.names == ["a"]


def test_leaves_have_docs_and_dotted_names():
    found = {leaf.name: leaf for leaf in leaves(Outer)}
    assert found["inner.rate"].doc == "a rate"
    assert found["data"].role == "input"
