"""Values: each one documented and in the README, each one read by a template, each change of configuration seen by its pods.

.venv/bin/python -m pytest tests/chart/test_values.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import chart
import pytest
import workloads
import yaml
from chart import CHART, ROOT
from manifests import Doc, labels, named, pods

from helm import readme
from pipelines import profile

EFFECTS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "effects.yaml").read_text(encoding="utf-8"))
VALUES = readme.read(CHART / "values.yaml")
LEAVES = {value.path: value for value in VALUES if not value.is_group}


def nested(path: str, value: Any) -> dict[str, Any]:
    """A value as a file would give it."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def another(default: Any) -> Any:
    """Another value of the same type."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, str):
        number = re.fullmatch(r"(\d+)(\D*)", default)
        return f"{int(number[1]) + 1}{number[2]}" if number else default + "x"
    return {**default, "changed": "x"} if isinstance(default, dict) else [*default, "changed"]


def context(path: str) -> dict[str, Any]:
    """The values below which a value matters: those of the longest beginning of its path that is named."""
    named_so = [name for name in EFFECTS["under"] if path == name or path.startswith(name + ".")]
    named_so = [name for name in named_so if path != f"{name}.enabled"]  # the switch itself
    return dict(EFFECTS["contexts"][EFFECTS["under"][max(named_so, key=len)]]) if named_so else {}


@functools.cache
def rendered(text: str) -> list[Doc]:
    return chart.changed(json.loads(text))


@pytest.mark.parametrize("path", sorted(set(LEAVES) - set(EFFECTS["only-refuses"])))
def test_the_value_changes_the_rendering(path: str) -> None:
    below = context(path)
    above = EFFECTS["to"].get(path, another(LEAVES[path].default))
    above = above["and"] if isinstance(above, dict) and "and" in above else nested(path, above)
    before, after = rendered(json.dumps(below)), chart.changed(chart.merged(below, above))
    assert before != after
    pods_see_their_configuration(before, after)


def pods_see_their_configuration(before: list[Doc], after: list[Doc]) -> None:
    """A long-running pod whose ConfigMap changed is made anew, and no pod is if nothing of its own changed."""
    old = {pod.title: pod for pod in pods(before)}
    for pod in pods(after):
        if not pod.is_long_running or pod.title not in old:
            continue
        for name in workloads.configs(pod):
            maps = [next(named(docs, "ConfigMap", name), {}).get("data") for docs in (before, after)]
            if None not in maps and maps[0] != maps[1]:
                assert pod.template != old[pod.title].template, f"{pod.title} does not see the change of {name}"


@pytest.mark.parametrize("path", EFFECTS["only-refuses"])
def test_a_value_that_only_refuses(path: str) -> None:
    done = chart.install_with(nested(path, another(LEAVES[path].default)))
    assert done.returncode != 0


def test_nothing_is_listed_that_is_no_value() -> None:
    assert not {*EFFECTS["to"], *EFFECTS["only-refuses"]} - set(LEAVES)
    assert not {path for path in EFFECTS["under"] if not any(leaf.startswith(path) for leaf in LEAVES)}
    assert set(EFFECTS["under"].values()) <= set(EFFECTS["contexts"])


def test_every_value_is_documented_and_stands_in_a_section() -> None:
    assert not [value.path for value in VALUES if not value.doc or not value.section]


def test_the_readme_is_the_one_that_the_values_give() -> None:
    assert readme.generated() == (CHART / "README.md").read_text(encoding="utf-8"), "run: python helm/readme.py"


def test_the_readme_says_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(
        "## Part\n\n# -- A group\ngroup:\n  # -- First, a|b\n  # and more\n  one: 1\n  # no doc\n  two: [a]\n"
        "# -- (free) Yours\nfree: {a: b}\n"
    )
    (tmp_path / "README.md").write_text(f"# x\n{readme.BEGIN}old\n{readme.END}\nrest\n")
    text = readme.generated(tmp_path)
    assert "| `group.one` | `1` | First, a\\|b and more |" in text
    assert "| **group** |  | A group |" in text
    assert '| `free` | `{"a": "b"}` | Yours |' in text
    assert text.startswith("# x\n")
    assert text.endswith("-->\nrest\n")
    assert "old" not in text
    undocumented = [value.path for value in readme.read(tmp_path / "values.yaml") if not value.doc]
    assert undocumented == ["group.two"]


def test_the_schema_knows_every_value_by_the_same_words_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    described: dict[str, str] = {}

    def walk(node: dict[str, Any], path: str) -> None:
        if "$ref" in node:
            node = {**schema["definitions"][node["$ref"].rsplit("/", 1)[1]], **node}
        for key, item in node.get("properties", {}).items():
            own = f"{path}.{key}" if path else key
            described[own] = item.get("description", "")
            if own not in LEAVES:
                walk(item, own)
        if "properties" in node:
            assert node.get("additionalProperties") is False, f"{path or 'the root'} is open"

    walk(schema, "")
    docs = {value.path: value.doc.removeprefix(readme.FREE) for value in VALUES}
    assert not set(docs) - set(described)
    further = set(described) - set(docs)  # of Kubernetes' own structures
    assert all(".resources." in path or ".probes." in path for path in further), further
    assert {path: text for path, text in described.items() if text and docs.get(path) != text} == {}


def test_common_labels_and_annotations_are_on_every_object() -> None:
    given = {"commonLabels": {"team": "data"}, "commonAnnotations": {"example.org/contact": "us"}}
    for doc in chart.changed(given):
        assert labels(doc)["team"] == "data"
        assert doc["metadata"]["annotations"]["example.org/contact"] == "us"
        assert "team" not in ((doc.get("spec") or {}).get("selector") or {}).get("matchLabels", {})


def test_the_schema_knows_the_pipeline_s_parameters_stages_and_profile() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    compiled = next(yaml.safe_load_all((ROOT / "pipelines/select_moe/pipeline.yaml").read_text(encoding="utf-8")))
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    types = {"STRING": "string", "NUMBER_INTEGER": "integer", "NUMBER_DOUBLE": "number", "BOOLEAN": "boolean"}
    types |= {"LIST": "array", "STRUCT": "object"}
    known = {name: item["type"] for name, item in schema["definitions"]["parameters"]["properties"].items()}
    assert known == {name: types[item["parameterType"]] for name, item in parameters.items()}
    own = schema["properties"]["pipeline"]["properties"]["profile"]["properties"]
    assert set(own["timeouts"]["properties"]) == {"default", *profile.STAGES}
    assert set(own["resources"]["properties"]) == set(profile.STAGES)
    given = {"image", "development", "image_pull_policy", "image_pull_secrets", "scratch", "model_cache"}
    given |= {"run_as_non_root"}  # left at its default, true: no value takes it back
    assert set(own) == {field.name for field in dataclasses.fields(profile.Profile)} - given
