"""An upgrade from the last released chart: the same values are taken, nothing that cannot be changed is, data and Secrets stay.

.venv/bin/python -m pytest tests/chart/test_upgrade.py

The last release is a package in released/. Whoever releases a version puts its package there and takes the older away:
`.venv/bin/helm package helm/select-moe --destination tests/chart/released`.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import chart
import pytest
import upgrade
import yaml
from chart import CHART, COMBINATIONS, HELM, NAMESPACE, RELEASE, render
from manifests import Doc, annotations, parse

(PACKAGE,) = (Path(__file__).parent / "released").glob("select-moe-*.tgz")
MOVES = [
    ("defaults", "digests"),
    ("defaults", "auth"),
    ("defaults", "postgresql-replicas-gc"),
    ("defaults", "without-seaweedfs"),
    ("defaults", "without-mlflow"),
    ("defaults", "mirror"),
    ("defaults", "scheduling"),
    ("defaults", "without-network-policies"),
    ("defaults", "run-at-install"),
    ("auth", "ingress-tls"),
    ("postgresql-replicas-gc", "auth-existing-postgresql"),
    ("without-tests-and-upload", "several-users"),
]
"""Changes of values that a user may make on a release."""
KNOWN = {*sum(MOVES, ()), "kind", "production", "airgapped", "volumes", "existing-claims"}
"""Combinations that every release takes."""


@pytest.fixture(scope="session")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last released chart, unpacked."""
    folder = tmp_path_factory.mktemp("released")
    with tarfile.open(PACKAGE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "select-moe"


def rendered(folder: Path, combination: str, files_of: Path) -> list[Doc] | None:
    """What a chart gives for a combination (the values files being those of another chart, perhaps); none: it refuses."""
    given = COMBINATIONS[combination]
    words = [word for name in given.get("files", []) for word in ("--values", str(files_of / name))]
    names = [given.get("release", RELEASE), str(folder), "--namespace", given.get("namespace", NAMESPACE)]
    with chart.values_file(given.get("values", {})) as above:
        done = chart.run(HELM, "template", *names, "--is-upgrade", *words, "--values", above, check=False)
    return None if done.returncode else parse(done.stdout)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_an_upgrade_with_the_same_values(name: str, last: Path) -> None:
    old = rendered(last, name, last)
    if old is None:  # values that the last release did not have
        assert name not in KNOWN
        return
    new = rendered(CHART, name, last)
    assert new, "values that the last release took are refused"
    assert not list(upgrade.changes(old, new))


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_an_upgrade_with_other_values(before: str, after: str) -> None:
    found = list(upgrade.changes(render(before).docs, render(after).docs))
    gone = [line for line in found if "is gone" in line and "seaweedfs" in line and after == "without-seaweedfs"]
    unused = [line for line in found if line.startswith("Secret/") and after == "without-seaweedfs"]
    assert found == [*gone, *unused]


def test_a_version_is_not_older_than_the_last_release() -> None:
    now = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["version"]
    then = PACKAGE.stem.removeprefix("select-moe-")
    assert [int(part) for part in now.split(".")] >= [int(part) for part in then.split(".")]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "_helpers.tpl",
            "app.kubernetes.io/component: {{ .component }}",
            "part: {{ .component }}",
            "spec.selector cannot",
        ),
        ("seaweedfs/statefulset.yaml", "serviceName: ", "serviceName: x", "spec.serviceName cannot be changed"),
        (
            "mlflow/persistentvolumeclaim.yaml",
            "ReadWriteOnce",
            "ReadWriteOncePod",
            "spec.accessModes cannot be changed",
        ),
        ("hooks/_hooks.tpl", '"random" 40', '"value" "x"', ""),
        ("_helpers.tpl", '"%s-s3"', '"%s-bucket"', "Secret/demo-select-moe-s3: AWS_ACCESS_KEY_ID is no longer there"),
    ],
)
def test_a_chart_that_cannot_be_upgraded_to(
    tmp_path: Path, last: Path, file: str, old: str, new: str, said: str
) -> None:
    changed = tmp_path / "select-moe"
    shutil.copytree(CHART, changed)
    path = changed / "templates" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    before, after = rendered(last, "defaults", last), rendered(changed, "defaults", last)
    assert before
    assert after
    found = list(upgrade.changes(before, after))
    assert any(said in line for line in found) if said else not found, found


def test_what_an_uninstall_leaves_is_marked() -> None:
    for name in ("defaults", "auth", "volumes"):
        docs = render(name).docs
        left = {doc["kind"] for doc in docs if annotations(doc).get(upgrade.KEPT) == "keep"}
        assert left == {"PersistentVolumeClaim"}
        assert not list(upgrade.left_behind(docs))
        assert all(
            "keep" in str(spec) for spec in (doc["data"] for doc in docs if "secrets.yaml" in (doc.get("data") or {}))
        )
