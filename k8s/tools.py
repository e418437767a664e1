"""The programs that `make kind-*` runs: which of them are here, in which version, and how they are called.

No command runs this module; `python -m k8s.kind` does. Words are handed to programs as lists: there is no shell.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selectmoe.errors import Unavailable, UserError

ROOT = Path(__file__).resolve().parent.parent
PROVIDER = "KIND_EXPERIMENTAL_PROVIDER"
"""Environment variable by which kind is told to use Podman."""
SECONDS_TO_SAY = 20
"""What a program may take to say its version; a Docker daemon that hangs does not."""


@dataclass(frozen=True)
class Program:
    """A program, the words that make it say its version, the oldest one that will do, and where it is had."""

    name: str
    words: tuple[str, ...]
    least: tuple[int, ...]
    where: str
    why: str = ""

    def wanted(self) -> str:
        """What a person is to install."""
        version = ".".join(map(str, self.least))
        return f"{self.name} {version} or later ({self.where})"


DOCKER = Program(
    "docker", ("version", "--format", "{{.Server.Version}}"), (23, 0), "https://docs.docker.com/engine/install/"
)
PODMAN = Program(
    "podman", ("version", "--format", "{{.Client.Version}}"), (4, 0), "https://podman.io/docs/installation"
)
PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "kind",
            ("version",),
            (0, 33, 0),
            "https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
            "the node image in k8s/kind/cluster.yaml belongs to that release",
        ),
        Program(
            "kubectl",
            ("version", "--client", "--output", "json"),
            (1, 35),
            "https://kubernetes.io/docs/tasks/tools/",
            "the cluster is Kubernetes 1.36, and kubectl may be one minor version apart",
        ),
        Program("helm", ("version", "--template", "{{.Version}}"), (3, 17), "https://helm.sh/docs/intro/install/"),
        Program(
            "git", ("--version",), (2,), "https://git-scm.com/downloads", "kubectl fetches KFP's manifests with it"
        ),
    )
}


class Tools:
    """The programs of one command, all of them proved to be here, and the environment they run in.

    Args:
        names: which of `PROGRAMS` are needed beside the container engine.
        kubeconfig: file of the cluster's credentials; the user's own is left alone.

    Raises:
        UserError: programs are missing, too old, or do not answer: all of them in one line.
    """

    def __init__(self, names: Sequence[str], kubeconfig: Path) -> None:
        self.path = os.pathsep.join([os.environ.get("PATH", ""), str(ROOT / ".venv" / "bin")])
        wrong: list[str] = []
        self.places: dict[str, str] = {}
        self.podman = False
        self._find_engine(wrong)
        for name in names:
            self._find(PROGRAMS[name], wrong)
        if wrong:
            raise UserError("; ".join(wrong))
        self.environment = os.environ | {"PATH": self.path, "KUBECONFIG": str(kubeconfig)}
        if self.podman:
            self.environment[PROVIDER] = "podman"
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = threading.Event()

    def _find_engine(self, wrong: list[str]) -> None:
        """Docker or podman: what CONTAINER_ENGINE or kind's own variable names, else the first that is installed."""
        asked = os.environ.get("CONTAINER_ENGINE") or os.environ.get(PROVIDER, "")
        found = [(name, place) for name in ([asked] if asked else ["docker", "podman"]) if (place := self._which(name))]
        if not found:
            which = f"{asked} is not" if asked else "neither docker nor podman is"
            wrong.append(f"{which} installed: {DOCKER.wanted()}, or {PODMAN.wanted()}")
            return
        name, place = found[0]
        self.places["engine"] = place
        # `docker` may be Podman under another name
        self.podman = "podman" in self._said(place, ("--version",)).lower() or Path(name).name == "podman"
        self._check(PODMAN if self.podman else DOCKER, place, wrong)

    def _find(self, program: Program, wrong: list[str]) -> None:
        place = self._which(program.name)
        if not place:
            reason = f", since {program.why}" if program.why else ""
            wrong.append(f"{program.name} is not installed: {program.wanted()}{reason}")
            return
        self.places[program.name] = place
        self._check(program, place, wrong)

    def _check(self, program: Program, place: str, wrong: list[str]) -> None:
        said = self._said(place, program.words)
        found = re.search(r"v?(\d+)\.(\d+)(?:\.(\d+))?", said)
        if not found:
            hint = ": is its daemon up, and may you use it?" if program is DOCKER else ""
            wrong.append(f"{place} {' '.join(program.words)} says no version{hint} (wanted: {program.wanted()})")
            return
        version = tuple(int(part or 0) for part in found.groups())
        if version[: len(program.least)] < program.least:
            text = ".".join(map(str, version))
            reason = f", since {program.why}" if program.why else ""
            wrong.append(f"{place} is {text}: {program.wanted()} is needed{reason}")

    def _which(self, name: str) -> str:
        return shutil.which(name, path=self.path) or ""

    def _said(self, place: str, words: Sequence[str]) -> str:
        try:
            done = subprocess.run([place, *words], capture_output=True, text=True, check=False, timeout=SECONDS_TO_SAY)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    def command(self, program: str, *words: str) -> list[str]:
        """The words of a call; `engine` stands for Docker or Podman."""
        return [self.places[program], *words]

    def run(self, program: str, *words: str, log: Path, extra: Mapping[str, str] | None = None) -> None:
        """Run a program; what it prints goes to a log.

        Args:
            program: one of `places`.
            words: its arguments.
            log: file that is appended to.
            extra: further environment variables.

        Raises:
            Unavailable: it failed; says the last lines it printed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {program} {' '.join(words)}\n")
            file.flush()
            began = file.tell()
            code = self._wait(self.command(program, *words), file, extra or {})
        if code:
            with open(log, encoding="utf-8", errors="replace") as file:
                file.seek(began)
                last = [line.strip() for line in file.read().splitlines() if line.strip()][-3:]
            raise Unavailable(f"{program} {' '.join(words[:3])} failed ({code}): {' | '.join(last)} (log: {log})")

    def _wait(self, words: list[str], file: object, extra: Mapping[str, str]) -> int:
        if self._stopped.is_set():
            raise Unavailable("stopped, since something else failed")
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=self.environment | dict(extra),
        )
        self._running.add(process)
        try:
            return int(process.wait())
        finally:
            self._running.discard(process)

    def ask(self, program: str, *words: str) -> str:
        """What a program prints.

        Raises:
            Unavailable: it failed; says what it printed as an error.
        """
        done = self.ask_anyway(program, *words)
        if done.returncode:
            said = " ".join(done.stderr.split())[-600:]
            raise Unavailable(f"{program} {' '.join(words[:3])} failed ({done.returncode}): {said}")
        return done.stdout

    def ask_anyway(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """The outcome of a program that may fail."""
        return subprocess.run(
            self.command(program, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=ROOT,
            env=self.environment,
        )

    def json(self, program: str, *words: str) -> dict[str, object]:
        """What a program prints, as JSON; an empty answer is an empty object."""
        found: dict[str, object] = json.loads(self.ask(program, *words).strip() or "{}")
        return found

    def stop(self) -> None:
        """End what is running and start nothing more: something else has failed."""
        self._stopped.set()
        for process in list(self._running):
            process.terminate()

    def machine(self) -> tuple[int, int]:
        """CPUs and bytes of memory that containers can use: on a Mac those of the virtual machine."""
        found = json.loads(self.ask("engine", "info", "--format", "json" if self.podman else "{{json .}}"))
        host = found.get("host", {})
        return int(host.get("cpus") or found.get("NCPU", 0)), int(host.get("memTotal") or found.get("MemTotal", 0))
