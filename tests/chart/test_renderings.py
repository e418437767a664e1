"""Every combination of values, against every rule.

.venv/bin/python -m pytest tests/chart/test_renderings.py
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import chart
import pytest
import rules
import schemas
import secrecy
import wiring
from chart import CHART, COMBINATIONS, HELM, render
from manifests import Doc, pods

from pipelines import profile

COMMAND = re.compile(r"^\s+(?:\$ )?(kubectl|helm|python|curl|\.venv/bin/python) \S", re.MULTILINE)

CHECKS = "templates/validate.yaml"
"""Renders nothing: it refuses values."""
PROFILES = ("kind", "production-airgapped", "gpu-site")
"""Those that are compiled, which takes seconds: between them they use every key. All of them are loaded."""


def profiles(name: str) -> list[str]:
    """The site's profile of a combination, if it has a pipeline."""
    maps = [doc.get("data") or {} for doc in render(name).docs if doc["kind"] == "ConfigMap"]
    return [data[wiring.PROFILE] for data in maps if wiring.PROFILE in data]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_rules(name: str) -> None:
    rendering = render(name)
    assert len(rendering.docs) > 5
    assert not list(rules.findings(rendering.docs, rendering.values, rendering.namespace))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_kubernetes_from_1_33_to_1_37_takes_it(name: str) -> None:
    assert not list(schemas.findings(render(name).docs))


def test_the_schemas_are_strict() -> None:
    doc: Doc = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "b"}}
    assert not list(schemas.findings([doc]))
    for wrong in ({"datas": {}}, {"data": {"a": 1}}, {"apiVersion": "v2"}):
        assert len(list(schemas.findings([doc | wrong]))) == len(schemas.VERSIONS)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_lint_is_content(name: str) -> None:
    with chart.values_file(COMBINATIONS[name].get("values", {})) as above:
        done = chart.run(
            HELM, "lint", "--strict", str(CHART), *chart.files(COMBINATIONS[name]), "--values", above, check=False
        )
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_notes_have_the_next_three_commands_and_no_secret(name: str) -> None:
    rendering = render(name)
    assert len(COMMAND.findall(rendering.notes)) == 3, rendering.notes
    assert not list(secrecy.material(rendering.notes))
    assert "<no value>" not in rendering.notes
    for word in re.findall(r"(?:-n|--namespace) (\S+)", rendering.notes):
        assert word in (rendering.namespace, rendering.values["kfp"]["namespace"]), rendering.notes
    kinds = {"svc": "Service", "service": "Service", "deployment": "Deployment", "statefulset": "StatefulSet"}
    known = {(doc["kind"], doc["metadata"]["name"]) for doc in rendering.docs}
    for kind, named in re.findall(r"\b(svc|service|deployment|statefulset)/([a-z0-9-]+)", rendering.notes):
        is_kfp = named.startswith("ml-pipeline")
        assert is_kfp or (kinds[kind], named) in known, f"{kind}/{named} is not of this release\n{rendering.notes}"


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_password_in_the_values(name: str) -> None:
    assert not list(secrecy.values(render(name).values))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_profile_says_what_the_values_say(name: str, tmp_path: Path) -> None:
    rendering = render(name)
    texts = profiles(name)
    assert len(texts) == bool(rendering.values["pipeline"]["enabled"])
    for text in texts:
        (tmp_path / "profile.yaml").write_text(text)
        site = profile.load(tmp_path / "profile.yaml")
        images = {container["image"] for pod in pods(rendering.docs) for container in pod.containers()}
        assert site.image in images
        assert site.development is ("@sha256:" not in site.image)


def test_the_pipeline_compiles_for_every_rendered_profile(tmp_path: Path) -> None:
    texts = {text for name in PROFILES for text in profiles(name)}
    assert len(texts) == len(PROFILES)
    for n, text in enumerate(sorted(texts)):
        given, made = tmp_path / f"{n}.yaml", tmp_path / f"{n}-pipeline.yaml"
        given.write_text(text)
        chart.run(sys.executable, "-m", "pipelines", "compile", f"profile={given}", f"output={made}")
        assert "exec-warmup" in made.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["defaults", "production", "kind", "gpu-site"])
def test_the_same_bytes_twice_and_for_every_kubernetes(name: str) -> None:
    texts = set()
    with chart.values_file(COMBINATIONS[name].get("values", {})) as above:
        for more in ([], [], ["--kube-version", "1.33.0"], ["--kube-version", "1.37.0"], ["--is-upgrade"]):
            given = [*chart.files(COMBINATIONS[name]), "--values", above]
            texts.add(chart.run(HELM, "template", "demo", str(CHART), *given, *more).stdout)
    assert len(texts) == 1


def test_a_package_renders_what_the_folder_renders(tmp_path: Path) -> None:
    chart.run(HELM, "package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    assert package.stat().st_size < 100_000
    texts = [chart.run(HELM, "template", "demo", str(path)).stdout for path in (CHART, package)]
    assert texts[0] == texts[1]


def test_every_template_is_rendered_by_some_combination() -> None:
    seen = set()
    for name in COMBINATIONS:
        seen |= set(re.findall(r"^# Source: select-moe/(templates/\S+)", render(name).text, re.MULTILINE))
    every = {str(path.relative_to(CHART)) for path in (CHART / "templates").rglob("*.yaml")} - {CHECKS}
    assert seen == every


def test_templates_have_nothing_random_and_ask_no_cluster() -> None:
    forbidden = re.compile(
        r"\b(rand\w+|shuffle|uuidv4|genPrivateKey|genCA\w*|gen\w*Cert\w*|now|date\w*|htpasswd|lookup|getHostByName|env|"
        r"expandenv|derivePassword|bcrypt|encryptAES)\b"
    )
    for path in (CHART / "templates").rglob("*"):
        if path.is_file():
            code = re.findall(r"\{\{(?!-?\s*/\*).*?\}\}", path.read_text(encoding="utf-8"), re.DOTALL)
            for expression in code:
                words = re.sub(r'"[^"]*"|[.$][\w.]+', "", expression)
                assert not forbidden.search(words), f"{path.name}: {expression}"


def test_a_broken_rendering_would_be_seen() -> None:
    docs = copy.deepcopy(render("defaults").docs)
    container = next(pod for pod in pods(docs) if pod.is_long_running).containers()[0]
    container["securityContext"]["privileged"] = True
    del container["resources"]
    found = list(rules.findings(docs, render("defaults").values, chart.NAMESPACE))
    assert [line.rsplit(": ", 1)[1] for line in found] == [
        "no request of cpu",
        "no request of memory",
        "privileged is not allowed",
    ]
