"""The chart's containers as processes: PostgreSQL, MLflow's own login, SeaweedFS's place taken by another real S3 server.

    .venv/bin/python -m pytest tests/chart/test_process_postgresql.py -q -n 0

In the order in which an installation goes: the secrets' Job (Kubernetes is a stand-in), the bucket's, the upgrade of a
database that an older MLflow made (killed once in the middle), the server and its probes, what `helm test` runs, the
upload (KFP is a stand-in), the CronJob of retention.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import psycopg
import pytest
import yaml
from chart import changed
from manifests import named
from postgresql import PASSWORD, USER, PostgreSQL
from processes import OLD, Mlflow, Site, ask

from selectmoe.journal import TAG
from tests.kfp_server import KfpServer
from tests.kubernetes_server import KubernetesServer
from tests.serving import S3Server

VALUES: dict[str, Any] = {
    "mlflow": {
        "replicas": 2,
        "database": {"type": "postgresql", "postgresql": {"host": "db.example", "existingSecret": {"name": "db"}}},
        "auth": {"enabled": True},
        "gc": {"enabled": True, "olderThan": "1s", "runsOlderThan": "1d"},
    },
}


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    server.create("mlflow")
    yield server
    server.close()


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[KubernetesServer]:
    server = KubernetesServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def kfp() -> Iterator[KfpServer]:
    with KfpServer() as server:
        yield server


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, postgresql: PostgreSQL, kubernetes: KubernetesServer, kfp: KfpServer
) -> Site:
    """The chart, rendered; its Secrets, made by its own Job."""
    folder = tmp_path_factory.mktemp("site")
    made = Site(changed(VALUES), folder, {"db.example:5432": f"127.0.0.1:{postgresql.port}"})
    made.addresses["http://ml-pipeline.kubeflow:8888"] = kfp.url
    made.mount("/etc/select-moe", "-secrets")
    made.mount("/etc/select-moe", "-profile")
    made.mount("/etc/select-moe", "-mlflow-auth")
    words = {"KUBECONFIG": kubernetes.kubeconfig(folder)}
    command = [*made.command("secrets"), "namespace=research"]
    done = subprocess.run(command, env=made.environment("secrets") | words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made.secrets = {
        place.partition("/")[2]: kubernetes.texts(place.partition("/")[2], "research") for place in kubernetes.secrets
    }
    made.secrets["db"] = {"username": USER, "password": PASSWORD}
    return made


@pytest.fixture(scope="module")
def s3(site: Site) -> Iterator[S3Server]:
    """An S3 server that knows the credentials which the Job made, and the bucket, made by its Job."""

    class Own(S3Server):
        KEY = site.secrets["demo-select-moe-s3"]["AWS_ACCESS_KEY_ID"]
        SECRET = site.secrets["demo-select-moe-s3"]["AWS_SECRET_ACCESS_KEY"]

    (site.folder / "s3").mkdir()
    server = Own(site.folder / "s3")
    site.addresses["http://demo-select-moe-seaweedfs.research:8333"] = server.url
    assert "made" in site.run("bucket")
    yield server
    server.close()


@pytest.fixture(scope="module")
def mlflow(site: Site, s3: S3Server, upgraded: None) -> Iterator[Mlflow]:
    server = Mlflow(site)
    site.addresses["http://demo-select-moe-mlflow.research:5000"] = f"http://127.0.0.1:{server.port}"
    yield server
    server.close()


def fill_old(postgresql: PostgreSQL) -> None:
    """The schema of an old MLflow, with an experiment and a run."""
    address = f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{postgresql.port}/mlflow"
    processes.old_schema(address)
    with postgresql.connect("mlflow") as connection:
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "VALUES (7, 'old', 'mlflow-artifacts:/7', 'active')"
        )
        connection.execute(
            "INSERT INTO runs (run_uuid, name, source_type, user_id, status, start_time, end_time, lifecycle_stage, "
            "artifact_uri, experiment_id) VALUES ('0123456789abcdef0123456789abcdef', 'kept', 'UNKNOWN', 'u', 'FINISHED', "
            "1, 2, 'active', 'mlflow-artifacts:/7/0123456789abcdef0123456789abcdef/artifacts', 7)"
        )


def revision(postgresql: PostgreSQL, table: str = "alembic_version") -> str:
    with postgresql.connect("mlflow") as connection:
        row = connection.execute(f"SELECT version_num FROM {table}").fetchone()  # type: ignore[arg-type]
    assert row is not None
    return str(row[0])


def waiting(connection: psycopg.Connection[Any], event: str) -> int:
    row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = %s", [event]).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture(scope="module")
def upgraded(site: Site, postgresql: PostgreSQL) -> None:
    """An old database, brought to the schema of today by the init container: killed in the middle, then twice at once."""
    fill_old(postgresql)
    assert revision(postgresql) == OLD
    with postgresql.connect("mlflow") as ours, ours.transaction():
        ours.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
        process = site.start("database")
        watch = postgresql.connect("mlflow")
        while not waiting(watch, "relation"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        processes.kill(process)
    watch.close()
    assert revision(postgresql) == OLD, "a kill in the middle leaves the old schema"
    both = [site.start("database") for _ in range(2)]
    said = [process.communicate(timeout=150)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(f"database of tracking: upgraded from {OLD}" in text for text in said) == 1, said
    assert sum("database of tracking: is at" in text for text in said) == 1, said
    assert sum("database of logins: filled" in text for text in said) == 1, said


def test_a_user_that_the_database_does_not_know(
    site: Site, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.install import patience
    from pipelines.install.__main__ import main

    monkeypatch.setattr(patience, "UNSETTLED_SECONDS", 0.0)
    for name, value in {**site.environment("database"), "PGPASSWORD": "another-password"}.items():
        monkeypatch.setenv(name, value)
    assert main(["database"]) == 2
    err = capsys.readouterr().err
    assert "check PGUSER, PGPASSWORD and the database's name" in err
    assert "another-password" not in err


def test_every_probe_is_answered(site: Site, mlflow: Mlflow) -> None:
    """On the port that the server is told to use, by any name (the kubelet asks by the pod's address), without a login."""
    found = list(processes.probes(site.container("mlflow")))
    assert {kind for kind, _, _ in found} == {"startupProbe", "readinessProbe", "livenessProbe"}
    for kind, path, port in found:
        assert port == mlflow.rendered_port, kind
        assert ask(mlflow.port, path, "10.244.1.7:5000") == 200, kind


def test_the_service_leads_to_the_server(site: Site, mlflow: Mlflow) -> None:
    (service,) = named(site.docs, "Service", "demo-select-moe-mlflow")
    names = {entry["name"]: entry["containerPort"] for entry in site.container("mlflow")["ports"]}
    (port,) = service["spec"]["ports"]
    assert names[port["targetPort"]] == mlflow.rendered_port
    assert port["port"] == 5000


def test_hosts_that_are_allowed_and_a_login_that_is_wanted(mlflow: Mlflow, site: Site) -> None:
    import base64

    password = site.secrets["demo-select-moe-mlflow-auth"]["password"]
    login = {"Authorization": "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()}
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    short = "demo-select-moe-mlflow"
    for name in (short, f"{short}.research", f"{short}.research.svc", f"{short}.research.svc.cluster.local"):
        assert ask(mlflow.port, path, f"{name}:5000", login) == 200, name
        assert ask(mlflow.port, path, name) == 401, "without a login"
    for host in ("evil.example", f"{short}.research.evil.example", "10.244.1.7:5000", f"evil-{short}"):
        assert ask(mlflow.port, path, host, login) == 403, host


def test_data_outlives_the_upgrade(site: Site, mlflow: Mlflow, postgresql: PostgreSQL) -> None:
    with postgresql.connect("mlflow") as connection:
        row = connection.execute("SELECT name, status FROM runs WHERE run_uuid LIKE '0123%'").fetchone()
    assert row == ("kept", "FINISHED")
    assert revision(postgresql, "alembic_version_auth")


def test_what_helm_test_runs(
    site: Site, mlflow: Mlflow, s3: S3Server, kubernetes: KubernetesServer, kfp: KfpServer
) -> None:
    assert "written to select-moe, read and deleted" in site.run("test-s3")
    assert "an artifact went to" in site.run("test-mlflow")
    assert "answers; pipelines that we see: 0" in site.run("test-kfp")
    kubernetes.rights = set()
    arguments = {word.partition("=")[0]: word.partition("=")[2] for word in site.container("test-rights")["args"]}
    kubernetes.rights = {*arguments["can"].strip("[]").split(",")}
    more = {"KUBECONFIG": str(site.folder / "kubeconfig")}
    command = [*site.command("test-rights"), "namespace=research"]
    environment = site.environment("test-rights") | more
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0
    kubernetes.rights |= {*arguments["cannot"].strip("[]").split(",")[:1]}
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 3


def test_the_pipeline_is_registered_for_this_site(site: Site, kfp: KfpServer) -> None:
    site.run("upload")
    (version,) = kfp.versions
    text = yaml.safe_dump(version.pipeline_spec)
    assert "http://demo-select-moe-seaweedfs.research:8333" in text
    assert "demo-select-moe-s3" in text
    assert "AWS_SECRET_ACCESS_KEY" in text
    assert not any(secret in text for secret in site.secrets["demo-select-moe-s3"].values())


def objects(s3: S3Server) -> set[str]:
    return {path.parent.parent.name for path in (s3.folder / "select-moe" / "mlflow").rglob("*.txt")}


def killed_in_the_middle(site: Site, postgresql: PostgreSQL) -> None:
    """Run retention until it has deleted a run's artifacts and is about to delete the run, and kill it there."""
    with postgresql.connect("mlflow") as ours, ours.transaction():
        ours.execute("LOCK TABLE metrics IN SHARE MODE")  # reading goes on; a run goes together with its metrics
        process = site.start("retention")
        with postgresql.connect("mlflow") as watch:
            while not waiting(watch, "relation"):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
        processes.kill(process)


def test_retention_deletes_artifacts_on_s3_for_good(
    site: Site, mlflow: Mlflow, s3: S3Server, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The CronJob, killed in the middle, then twice at once: what is in the bin goes for good, old runs of ours go there."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", site.secrets["demo-select-moe-mlflow-auth"]["password"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow.port}")
    client = MlflowClient(f"http://127.0.0.1:{mlflow.port}")
    experiment = client.create_experiment("retention")
    (tmp_path / "note.txt").write_text("x")
    now = int(time.time() * 1000)
    runs: dict[str, str] = {}

    def make(name: str, age_days: int, parent: str = "", ours: bool = True, ended: bool = True, **tags: str) -> str:
        given = {TAG + key: value for key, value in {"stage": "route", **tags}.items()} if ours else {}
        given |= {"mlflow.parentRunId": runs[parent]} if parent else {}
        run = client.create_run(experiment, now - age_days * 86_400_000, given, name)
        runs[name] = run.info.run_id
        client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
        if ended:
            client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

    make("binned", 0)
    make("old", 2)
    make("old parent", 2)
    make("registered", 2, "old parent")
    make("referred to", 2)
    make("young", 0, artifacts_in=runs["referred to"])
    make("old, runs", 2, ended=False)
    make("old, not ours", 2, ours=False)
    client.create_registered_model("m")
    client.create_model_version("m", client.get_run(runs["registered"]).info.artifact_uri, runs["registered"])
    client.delete_run(runs["binned"])
    there = objects(s3)
    assert there >= {*runs.values()}, "and the run of helm test's proof, which is in the bin as well"
    time.sleep(1.1)
    kept = {name for name in runs if name not in ("binned", "old")}
    killed_in_the_middle(site, postgresql)
    (gone,) = there - objects(s3)
    with postgresql.connect("mlflow") as connection:
        query = "SELECT lifecycle_stage FROM runs WHERE run_uuid = %s"
        assert connection.execute(query, [gone]).fetchall() == [("deleted",)], "its artifacts are gone, it is not"
    both = [site.start("retention") for _ in range(2)]
    said = [process.communicate(timeout=150)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert objects(s3) == {runs[name] for name in kept}
    with postgresql.connect("mlflow") as connection:
        rows = connection.execute("SELECT name FROM runs WHERE experiment_id = %s", [int(experiment)]).fetchall()
    assert {row[0] for row in rows} == kept
