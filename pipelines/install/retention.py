"""Delete for good what was deleted in MLflow some time ago, artifacts included; before that, delete what is old.

    MLFLOW_TRACKING_URI=http://mlflow:5000 MLFLOW_BACKEND_STORE_URI=postgresql+psycopg://db:5432/mlflow \
      python -m pipelines.install retention older_than=30d runs_older_than=180d

A deleted run can be restored in MLflow until it is older than `older_than`. With `runs_older_than` finished runs of
Select-MoE which began longer ago are deleted first; never one that a registered model's version or a younger run
refers to. The artifacts are deleted by the MLflow server (its credentials reach S3, ours need not). PostgreSQL only: a
SQLite file belongs to the server's own pod.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from pipelines.install.database import URI, checked, locked
from pipelines.install.options import WAIT, option
from pipelines.install.patience import patiently
from selectmoe.errors import Unavailable, UserError

AGE = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
SECONDS = (86400, 3600, 60, 1)


@dataclass(frozen=True)
class Options:
    """The keys of the command."""

    older_than: str = option("what was deleted longer ago is deleted for good, such as 30d or 12h30m")
    runs_older_than: str = option("finished runs that began longer ago are deleted first; default: none", "")
    wait: int = option(WAIT, 300)


def run(options: Options) -> None:
    """Delete what is old enough.

    Raises:
        UserError: an age that is none, a SQLite database, no address of MLflow.
        Unavailable: MLflow or its database does not answer, or an artifact could not be deleted.
    """
    seconds(f"older_than={options.older_than}")
    limit = seconds(f"runs_older_than={options.runs_older_than}") if options.runs_older_than else 0
    database, server = checked(URI, os.environ.get(URI, "")), os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if database.startswith("sqlite:"):
        raise UserError(f"{URI} is a SQLite file, which belongs to the MLflow server's pod: retention wants PostgreSQL")
    if not server.startswith(("http://", "https://")):
        raise UserError(
            "MLFLOW_TRACKING_URI must be the MLflow server's address: it is the server that deletes artifacts"
        )

    def cleaned() -> None:
        _answers(server)
        with locked(database):
            if limit:
                from selectmoe import tracking

                gone = tracking.expire(server, int((time.time() - limit) * 1000))
                print(f"runs that began more than {options.runs_older_than} ago: {gone} deleted", flush=True)
            _collect(database, options.older_than)

    patiently(options.wait, cleaned)


def seconds(word: str) -> int:
    """The seconds of an age.

    Args:
        word: of the form key=AGE, an age such as 30d or 12h30m.

    Raises:
        UserError: it is none.
    """
    found = AGE.fullmatch(word.partition("=")[2])
    if not found:
        raise UserError(f"{word} must be an age such as 30d, 12h or 1d12h")
    return sum(int(number or 0) * unit for number, unit in zip(found.groups(), SECONDS, strict=True))


def _answers(server: str) -> None:
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=10):
            return
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise UserError(
                f"MLflow at {server} answers 403 (Invalid Host header): name its host in --allowed-hosts"
            ) from None
        raise Unavailable(f"MLflow at {server} answers {error.code}") from None
    except OSError as error:
        raise Unavailable(f"MLflow at {server} does not answer ({error})") from None


def _collect(database: str, older_than: str) -> None:
    """MLflow's own garbage collection."""
    command = ["mlflow", "gc", "--backend-store-uri", database, "--older-than", older_than]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    gone = [line for line in done.stdout.splitlines() if "permanently deleted" in line]
    print(f"deleted more than {older_than} ago: {len(gone)} deleted for good", flush=True)
    if done.returncode:
        print("\n".join(done.stderr.strip().splitlines()[-25:]), file=sys.stderr, flush=True)
        raise Unavailable(f"MLflow's garbage collection failed (exit code {done.returncode})")
