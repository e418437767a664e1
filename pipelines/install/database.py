"""Bring MLflow's database, and that of its logins, to the schema of this image's MLflow.

    MLFLOW_BACKEND_STORE_URI=postgresql+psycopg://db:5432/mlflow PGUSER=mlflow PGPASSWORD=... \
      python -m pipelines.install database

An empty database is filled, an old one upgraded, a current one left alone; one of a newer MLflow is refused. Two of these
at the same time wait for each other. A kill costs nothing: PostgreSQL rolls back, and of a SQLite file a copy is
upgraded, which then takes the file's place (no server may be using it: the chart stops the old pod first). Where
`MLFLOW_AUTH_CONFIG_PATH` names the configuration of MLflow's logins, their database is treated likewise.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import fcntl
import importlib.util
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.install.options import WAIT, option
from pipelines.install.patience import Unsettled, patiently
from selectmoe.errors import Unavailable, UserError

URI = "MLFLOW_BACKEND_STORE_URI"
AUTH = "MLFLOW_AUTH_CONFIG_PATH"
LOCK = 0x5E1EC7
"""Key of the PostgreSQL advisory lock under which schemas are upgraded and old runs are deleted."""


@dataclass(frozen=True)
class Options:
    """The keys of the command."""

    wait: int = option(WAIT, 300)


@dataclass(frozen=True)
class Schema:
    """One of MLflow's schemas: where its revision stands, where its migrations lie, the command that applies them."""

    name: str
    table: str
    migrations: str
    command: Callable[[str], list[str]]

    def known(self) -> tuple[str, set[str]]:
        """The revision of this image's MLflow, and all that it knows.

        Alembic would import every migration, and with it MLflow: seconds, at each start of a pod.
        """
        package = importlib.util.find_spec("mlflow")
        if package is None or not package.submodule_search_locations:
            raise UserError("mlflow is not installed: use the project's image, or its extra `tracking`")
        before: dict[str, Any] = {}
        for path in Path(package.submodule_search_locations[0], self.migrations, "versions").glob("*.py"):
            names = _constants(path)
            if "revision" in names:
                before[names["revision"]] = names["down_revision"]
        (head,) = before.keys() - before.values()
        return str(head), {*before}


def _constants(path: Path) -> dict[str, Any]:
    """What a module assigns at its top that is a plain text or None."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(getattr(node, "value", None), ast.Constant):
            found |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}  # type: ignore
    return found


TRACKING = Schema("tracking", "alembic_version", "store/db_migrations", lambda uri: ["mlflow", "db", "upgrade", uri])
LOGINS = Schema(
    "logins",
    "alembic_version_auth",
    "server/auth/db/migrations",
    lambda uri: ["mlflow.server.auth", "db", "upgrade", "--url", uri],
)


def run(options: Options) -> None:
    """Upgrade what there is to upgrade.

    Raises:
        UserError: the address is wrong or missing, or the database is of a newer MLflow.
        Unavailable: the database does not answer.
    """
    places = [(TRACKING, checked(URI, os.environ.get(URI, "")))]
    if config := os.environ.get(AUTH, ""):
        places.append((LOGINS, checked(f"database_uri in {config}", _logins(config))))
    for schema, uri in places:
        work = _sqlite if uri.startswith("sqlite:") else _postgresql

        def upgraded(schema: Schema = schema, uri: str = uri, work: Callable[..., str] = work) -> str:
            return work(schema, uri)

        print(f"database of {schema.name}: {patiently(options.wait, upgraded)}", flush=True)


def checked(where: str, uri: str) -> str:
    """An address of a database that is one, and holds no password.

    Args:
        where: where the address stands.
        uri: the address.

    Raises:
        UserError: it is missing, of another kind, or holds a user or password.
    """
    if not uri:
        raise UserError(f"{where} is not set: sqlite:////data/mlflow.db or postgresql+psycopg://HOST:5432/DATABASE")
    if not uri.startswith(("sqlite:////", "postgresql://", "postgresql+psycopg://")):
        scheme = uri.partition("://")[0]
        raise UserError(f"{where} is of kind {scheme!r}: sqlite:////ABSOLUTE/PATH or postgresql+psycopg://HOST:PORT/DB")
    if not uri.startswith("sqlite:") and "@" in urlsplit(uri).netloc:
        raise UserError(f"{where} must hold neither user nor password: set PGUSER and PGPASSWORD from a Secret")
    return uri


def _logins(config: str) -> str:
    parser = configparser.ConfigParser()
    if not parser.read(config) or not parser.has_option("mlflow", "database_uri"):
        raise UserError(f"{AUTH}={config} is no file with database_uri below [mlflow]")
    return parser.get("mlflow", "database_uri")


@contextlib.contextmanager
def locked(uri: str) -> Iterator[Callable[[str], str]]:
    """Be alone with a PostgreSQL database among the chart's commands; ends with this process, however it ends.

    Args:
        uri: its address.

    Yields:
        A function: table -> the one value in it, empty where there is none.

    Raises:
        Unavailable: it does not answer.
        Unsettled: it does not know the user or the database.
    """
    import psycopg

    try:
        connection = psycopg.connect("postgresql://" + uri.partition("://")[2], connect_timeout=5, autocommit=True)
    except psycopg.OperationalError as error:
        raise _refusal(error) from None

    def value(table: str) -> str:
        row = connection.execute("SELECT to_regclass(%s)", [table]).fetchone()
        if row is None or row[0] is None:
            return ""
        found = connection.execute(f'SELECT version_num FROM "{table}"').fetchone()  # one of two names above
        return str(found[0]) if found else ""

    with connection:
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        yield value


def _refusal(error: Exception) -> Exception:
    """What a refused connection means; PostgreSQL's words hold the user's name, never the password."""
    text = " ".join(str(error).split())
    if re.search("does not exist|authentication failed|no password supplied|pg_hba", text):
        hint = "check PGUSER, PGPASSWORD and the database's name"
        return Unsettled(f"PostgreSQL refuses us ({text[-200:]}): {hint}")
    return Unavailable(f"PostgreSQL does not answer ({text[-200:]})")


def _postgresql(schema: Schema, uri: str) -> str:
    head, known = schema.known()
    with locked(uri) as revision:
        before = revision(schema.table)
        if said := _settled(schema, before, head, known):
            return said
        _upgrade(schema, uri)
        return _told(before, revision(schema.table), head)


def _sqlite(schema: Schema, uri: str) -> str:
    """Upgrade a copy, look at it, put it in the file's place."""
    path = Path(uri.removeprefix("sqlite:///"))
    head, known = schema.known()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{path.parent} may not be written ({error.strerror}): the volume's owner must be the pod's group"
        ) from None
    copy = path.with_name(f".{path.name}.upgrade")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _revision(path, schema.table) if path.exists() else ""
        if said := _settled(schema, before, head, known):
            return said
        for rest in path.parent.glob(f"{copy.name}*"):
            rest.unlink()
        if path.exists():
            with contextlib.closing(sqlite3.connect(path)) as old, contextlib.closing(sqlite3.connect(copy)) as new:
                old.backup(new)
        _upgrade(schema, f"sqlite:///{copy}")
        said = _told(before, _revision(copy, schema.table), head)
        with open(copy, "rb+") as file:
            os.fsync(file.fileno())
        copy.replace(path)
        return said


def _revision(path: Path, table: str) -> str:
    """The revision of a SQLite file, after everything that its last user left in a journal is in the file itself."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [table]).fetchone():
                return ""
            found = database.execute(f'SELECT version_num FROM "{table}"').fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is no whole SQLite database ({error}): restore it from a backup") from None
    return str(found[0]) if found else ""


def _settled(schema: Schema, before: str, head: str, known: set[str]) -> str:
    """What is to be said where there is nothing to do; empty where there is."""
    if before and before not in known:
        raise UserError(
            f"the database of {schema.name} is at revision {before}, which this image's MLflow does not know: it was "
            "upgraded by a newer one; use that image, or restore the backup from before"
        )
    return f"is at {head} already" if before == head else ""


def _told(before: str, after: str, head: str) -> str:
    if after != head:
        raise Unavailable(f"the upgrade ended at revision {after or 'none'}, not at {head}")
    return f"upgraded from {before} to {head}" if before else f"filled, at {head}"


def _upgrade(schema: Schema, uri: str) -> None:
    """MLflow's own command; its words are shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *schema.command(uri)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-25:]
        print("\n".join(tail), file=sys.stderr, flush=True)
        raise Unavailable(f"MLflow could not upgrade the database of {schema.name} (exit code {done.returncode})")
