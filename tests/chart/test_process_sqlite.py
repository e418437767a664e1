"""The chart's defaults as processes: MLflow on SQLite, upgraded by the init container.

.venv/bin/python -m pytest tests/chart/test_process_sqlite.py -q -n 0
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from chart import changed
from manifests import named
from processes import OLD, Mlflow, Site, ask

from pipelines.install.__main__ import main
from pipelines.install.database import LOGINS, TRACKING, Schema
from tests.serving import S3Server


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    (folder / "data").mkdir()
    keys = {"AWS_ACCESS_KEY_ID": S3Server.KEY, "AWS_SECRET_ACCESS_KEY": S3Server.SECRET}
    return Site(changed({}), folder, {"sqlite:////data/": f"sqlite:///{folder}/data/"}, {"demo-select-moe-s3": keys})


@pytest.fixture(scope="module")
def database(site: Site) -> Path:
    """The file that the rendered address names, of an older MLflow, with a run in it."""
    address = site.environment("database")["MLFLOW_BACKEND_STORE_URI"]
    processes.old_schema(address)
    path = Path(address.removeprefix("sqlite:///"))
    execute(path, "PRAGMA journal_mode=WAL")
    execute(path, "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'old', 'active')")
    return path


def execute(path: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


@pytest.fixture(scope="module")
def upgraded(site: Site, database: Path) -> Path:
    """The init container, killed in the middle, then twice at once."""
    process = site.start("database")
    copy = database.with_name(f".{database.name}.upgrade")
    while not copy.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    processes.kill(process)
    assert execute(database, "SELECT version_num FROM alembic_version") == [(OLD,)]
    both = [site.start("database") for _ in range(2)]
    said = [process.communicate(timeout=150)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(f"database of tracking: upgraded from {OLD}" in text for text in said) == 1, said
    assert sum("is at" in text for text in said) == 1, said
    return database


@pytest.fixture(scope="module")
def mlflow(site: Site, upgraded: Path) -> Iterator[Mlflow]:
    (site.folder / "s3" / "select-moe").mkdir(parents=True)
    s3 = S3Server(site.folder / "s3")
    site.addresses["http://demo-select-moe-seaweedfs.research:8333"] = s3.url
    server = Mlflow(site)
    site.addresses["http://demo-select-moe-mlflow.research:5000"] = f"http://127.0.0.1:{server.port}"
    yield server
    server.close()
    s3.close()


def test_nothing_is_lost_and_nothing_is_left(upgraded: Path) -> None:
    assert execute(upgraded, "SELECT name FROM experiments WHERE experiment_id = 7") == [("old",)]
    assert {path.name for path in upgraded.parent.iterdir()} - {upgraded.name} <= {f".{upgraded.name}.lock"}


def test_every_probe_is_answered(site: Site, mlflow: Mlflow) -> None:
    found = list(processes.probes(site.container("mlflow")))
    assert {kind for kind, _, _ in found} == {"startupProbe", "readinessProbe", "livenessProbe"}
    for kind, path, port in found:
        assert port == mlflow.rendered_port, kind
        assert ask(mlflow.port, path, "10.244.1.7:5000") == 200, kind
        assert ask(mlflow.port, path + "x", "10.244.1.7:5000") != 200, "any other path is not a probe's"


def test_hosts(mlflow: Mlflow) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    short = "demo-select-moe-mlflow"
    names = (short, f"{short}.research", f"{short}.research.svc", f"{short}.research.svc.cluster.local", "localhost")
    for name in names:
        for host in (name, f"{name}:5000"):
            assert ask(mlflow.port, path, host) == 200, host
    for host in ("evil.example", f"{short}.evil.example:5000", "10.244.1.7:5000"):
        assert ask(mlflow.port, path, host) == 403, host


def test_artifacts_go_to_s3_through_the_server(site: Site, mlflow: Mlflow) -> None:
    """The client has no S3 credentials."""
    assert not any(key.startswith("AWS") for key in site.environment("test-mlflow"))
    assert "and back" in site.run("test-mlflow")
    assert any((site.folder / "s3" / "select-moe" / "mlflow").rglob("proof.txt"))
    assert (named(site.docs, "Deployment").__next__())["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "MLFLOW_BACKEND_STORE_URI is not set"),
        ("sqlite:///mlflow.db", "sqlite:////ABSOLUTE/PATH"),
        ("mysql://host/db", "of kind 'mysql'"),
        ("postgresql://me:secret@host/db", "must hold neither user nor password: set PGUSER and PGPASSWORD"),
        ("sqlite:////proc/mlflow.db", "may not be written"),
    ],
)
def test_addresses_that_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", uri)
    monkeypatch.delenv("MLFLOW_AUTH_CONFIG_PATH", raising=False)
    assert main(["database", "wait=0"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "secret@" not in err


@pytest.mark.parametrize("schema", [TRACKING, LOGINS], ids=lambda schema: schema.name)
def test_revisions_are_those_that_alembic_finds(schema: Schema) -> None:
    import mlflow as package
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(package.__file__).parent / schema.migrations))
    assert schema.known() == (scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()})


def test_a_database_of_a_newer_mlflow_and_one_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{path}")
    monkeypatch.delenv("MLFLOW_AUTH_CONFIG_PATH", raising=False)
    execute(path, "CREATE TABLE alembic_version (version_num TEXT)")
    execute(path, "INSERT INTO alembic_version VALUES ('ffffffffffff')")
    assert main(["database"]) == 2
    assert "at revision ffffffffffff, which this image's MLflow does not know" in capsys.readouterr().err
    path.write_bytes(b"no database" * 100)
    assert main(["database"]) == 2
    assert "is no whole SQLite database" in capsys.readouterr().err


def test_retention_is_for_postgresql(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////data/mlflow.db")
    assert main(["retention", "older_than=30d"]) == 2
    assert "retention wants PostgreSQL" in capsys.readouterr().err
    for age in ("30", "d", "1.5d", "", "1d 2h"):
        assert main(["retention", "older_than=30d", f"runs_older_than={age or 'x'}"]) == 2
    assert "must be an age such as 30d" in capsys.readouterr().err
