"""A container engine for the image's tests: the one that answers, or a stock Docker engine started for them.

The engine that is started needs root and Debian's packages (`make image-test` installs them); it makes no bridge and no
firewall rule, so containers have the host's network or none. Its data lie in a folder of its own, removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BASE = "python:3.11-slim-bookworm"
STAND_IN = "select-moe-test-base:bookworm"
PACKAGES = "ca-certificates,python3,python3-venv"
MIRROR = "http://deb.debian.org/debian"
CLIENT = shutil.which("docker", path="/usr/bin") or shutil.which("docker") or "docker"
"""Debian's client first: it has BuildKit without a plug-in."""
HARDENED = ("--read-only", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
"""What a cluster's restricted profile asks for, and a root file system that nobody writes."""


def docker(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Call the client; the engine is that of `DOCKER_HOST`."""
    return subprocess.run([CLIENT, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def said(*arguments: str, timeout: float = 300) -> str:
    """What a call that succeeds says."""
    done = docker(*arguments, timeout=timeout)
    assert done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def answers() -> bool:
    """Whether an engine answers."""
    with contextlib.suppress(FileNotFoundError):
        return docker("version", "--format", "{{.Server.Version}}").returncode == 0
    return False


@contextlib.contextmanager
def running() -> Iterator[None]:
    """An engine that answers: the one that is here, or one started for the tests."""
    if answers():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="select-moe-engine-") as folder, started(Path(folder)):
        yield


@contextlib.contextmanager
def started(folder: Path) -> Iterator[None]:
    """An engine whose everything lies in a folder; at the end, whatever happened, no process and no mount is left of it.

    Args:
        folder: an empty one.
    """
    assert shutil.which("dockerd"), (
        "no container engine answers, and dockerd is not installed (see scripts/image_test.sh)"
    )
    socket = f"unix://{folder / 'socket'}"
    command = ["dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false"]
    command += ["--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")]
    command += ["--pidfile", str(folder / "pid"), "-H", socket]
    with pytest.MonkeyPatch.context() as patch, open(folder / "log", "wb") as log:
        patch.setenv("DOCKER_HOST", socket)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, folder / "log")
            yield
        finally:
            _stop(process)
            unmount(folder)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not answers():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dockerd does not answer:\n{log.read_text(errors='replace')}")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the engine and what still runs in it."""
    names = docker("ps", "--all", "--quiet").stdout.split()
    if names:
        docker("rm", "--force", *names)
    process.terminate()  # its containerd goes with it
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def unmount(folder: Path) -> None:
    """Take away every mount below a folder: the engine leaves the network's name space of its containers."""
    places = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for place in reversed(places):  # the latest first
        if Path(place).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", place], check=True)  # what was killed may not have let go of it


def base() -> str:
    """The image to build from: `SELECTMOE_TEST_BASE`, the official one, or a stand-in where it cannot be pulled."""
    given = os.environ.get("SELECTMOE_TEST_BASE", "")
    if given:
        return given
    if docker("image", "inspect", BASE).returncode == 0 or docker("pull", "--quiet", BASE).returncode == 0:
        return BASE
    if docker("image", "inspect", STAND_IN).returncode != 0:
        stand_in()
    return STAND_IN


def stand_in() -> None:
    """Debian with its own Python 3.11, which trusts the certificates that this machine trusts."""
    with tempfile.TemporaryDirectory(prefix="select-moe-base-") as folder:
        root = Path(folder, "root")
        root.mkdir()
        # In memory: dpkg waits for the disk at every file.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root)], check=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), MIRROR]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            assert process.wait() == 0, "debootstrap failed: see the lines above"
            import_base(root)
        finally:
            if process.poll() is None:  # a test that took too long: its programs work on without it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            unmount(root)  # and what debootstrap mounted in it


def import_base(root: Path) -> None:
    """Make the stand-in image of a Debian tree.

    Args:
        root: what debootstrap wrote.
    """
    trusted = Path("/usr/local/share/ca-certificates")
    for certificate in trusted.glob("*.crt"):
        shutil.copy(certificate, root / trusted.relative_to("/"))
    subprocess.run(["chroot", str(root), "update-ca-certificates"], check=True, stdout=subprocess.DEVNULL)
    link = root / "usr/local/bin/python"
    link.unlink(missing_ok=True)
    link.symlink_to("/usr/bin/python3")
    leftovers = [*(root / "var/cache/apt/archives").glob("*.deb"), *(root / "var/lib/apt/lists").glob("*_*")]
    for path in leftovers:
        path.unlink()
    tar = subprocess.Popen(
        ["tar", "-C", str(root), "--exclude=./proc/*", "--exclude=./dev/*", "-c", "."], stdout=subprocess.PIPE
    )
    subprocess.run([CLIENT, "import", "-", STAND_IN], stdin=tar.stdout, check=True, stdout=subprocess.DEVNULL)
    assert tar.wait() == 0
