"""Study: `make run` killed with `kill -9` in the middle of every stage ends as if nothing had happened.

    make study-kill PRESET=quick

The pipeline runs once undisturbed (in a state folder of its own) and once with a kill of its whole process group in
the middle of every stage, each followed by the same command again. Printed, as a Markdown table: how long the stage
takes undisturbed, after what time it was killed, and how much of that was lost because it had not been committed; then
whether the report's identity and the verdict's bytes are those of the undisturbed run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Pipeline:
    """`make run`'s command with a state folder of its own."""

    state: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str] | None = None

    def start(self, command: str = "run") -> subprocess.Popen[str]:
        """The command in a process group of its own; its words go to `STATE/../NAME.screen`."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **(self.environment or {}), "SELECTMOE_STATE": str(self.state)}
        arguments = self.arguments if command == "run" else ()
        with open(self.state.with_suffix(".screen"), "a", encoding="utf-8") as screen:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines.local", command, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=screen,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self) -> None:
        """To the end.

        Raises:
            RuntimeError: the pipeline failed.
        """
        if self.start().wait() != 0:
            raise RuntimeError(f"the pipeline failed: see {self.state.with_suffix('.screen')}")

    def down(self) -> None:
        """Stop the servers."""
        self.start("down").wait()

    def events(self) -> list[str]:
        """The stages whose tasks were begun in this run, in order."""
        path = self.state / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [entry["stage"] for entry in map(json.loads, lines) if "exit" not in entry]

    def kill_in(self, stage: str, after: float, later: Collection[str] = ()) -> tuple[float, float]:
        """Start, and kill the whole group `after` seconds after the first task of a stage has begun.

        Args:
            stage: its name.
            after: seconds.
            later: stages that follow; where one of them begins, the kill comes at once.

        Returns:
            The seconds that the stage really ran, and those of them since its last commit.

        Raises:
            RuntimeError: the run ended before the kill.
        """
        (self.state / "events.jsonl").unlink(missing_ok=True)
        process = self.start()
        while stage not in self.events():
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before {stage}: see {self.state.with_suffix('.screen')}")
            time.sleep(0.05)
        begun, since = time.monotonic(), time.time()
        while time.monotonic() - begun < after and process.poll() is None and not {*later} & {*self.events()}:
            time.sleep(0.05)
        if process.poll() is not None:
            raise RuntimeError(f"the run ended within {after:.1f} s of {stage}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ran = time.monotonic() - begun
        committed = [p.stat().st_mtime - since for p in (self.state / "work" / stage).rglob("*") if p.is_file()]
        return ran, ran - max([0.0, *committed])

    def finished(self) -> dict[str, Path]:
        """The newest finished output of every task that KFP's folders hold: RUN/[LOOP/]TASK/ARTIFACT."""
        found: dict[str, tuple[float, Path]] = {}
        for path in [
            p for depth in ("*/*/*", "*/*-iteration-*/*/*") for p in (self.state / "kfp").glob(f"{depth}/manifest.json")
        ]:
            task = re.sub(r"-\d+$", "", path.parent.parent.name)
            age = path.stat().st_mtime
            if age > found.get(task, (0.0, path))[0]:
                found[task] = (age, path.parent)
        return {task: path for task, (_, path) in found.items()}


def seconds(output: Path) -> float:
    """How long the process that finished an output worked on it."""
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    return float(manifest["environment"]["seconds"])


def same_result(one: Path, other: Path) -> bool:
    """Whether two reports have the same identity and the same bytes of the verdict."""
    identity = [json.loads((p / "manifest.json").read_text(encoding="utf-8"))["identity"] for p in (one, other)]
    return identity[0] == identity[1] and (one / "verdict.json").read_bytes() == (other / "verdict.json").read_bytes()


def main(arguments: list[str]) -> int:
    """`FOLDER key=value ...`: where both state folders go, and the run's settings."""
    folder, settings = Path(arguments[0]).resolve(), tuple(arguments[1:])
    # One folder of demo data for both: the same files at the same place.
    whole = Pipeline(folder / "whole", (*settings, f"demo_dir={folder / 'demo'}"))
    killed = Pipeline(folder / "killed", whole.arguments)
    try:
        whole.run()
        reference = whole.finished()
        order = [stage for stage in dict.fromkeys(whole.events()) if stage in reference and stage != "check"]
        before: dict[str, tuple[float, float]] = {}
        for i, stage in enumerate(order):
            later = (
                {*order[i + 1 :]} - {"finetune", "evaluate"} if stage in ("finetune", "evaluate") else order[i + 1 :]
            )
            before[stage] = killed.kill_in(stage, 0.5 + seconds(reference[stage]) / 2, later)
        killed.run()
        print("| stage | undisturbed, s | killed after, s | lost, s |\n|---|---|---|---|")
        for stage, (ran, lost) in before.items():
            print(f"| {stage} | {seconds(reference[stage]):.1f} | {ran:.1f} | {lost:.1f} |")
        equal = same_result(reference["report"], killed.finished()["report"])
        print(
            f"\nreport's identity and verdict's bytes {'are those' if equal else 'ARE NOT those'} of the undisturbed run"
        )
        return 0 if equal else 3
    finally:
        for pipeline in (whole, killed):
            pipeline.down()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
