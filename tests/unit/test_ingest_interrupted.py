"""Ingest killed, on a full disk, and over files that change: pytest tests/unit/test_ingest_interrupted.py"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from selectmoe import ingest as stage
from selectmoe import intake
from selectmoe import manifest as mf
from selectmoe.config import load
from selectmoe.errors import Unavailable, UserError
from selectmoe.ingest import IngestConfig, run

ROOT = Path(__file__).parents[2]
ROWS = 12_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of rows of random letters, which hardly compress."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    letters = [chr(n) for n in range(35, 127) if chr(n) != "\\"]
    for name in ("a", "b"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for n in range(ROWS // 2):
                answer = "".join(chance.choices(letters, k=1000))
                turns = [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
    return folder


def command(data: Path, out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "selectmoe.cli", "ingest", f"data={data}", f"output_dir={out}", "workers=2", *words]


def start(data: Path, out: Path, limit: int = 0) -> subprocess.Popen[str]:
    def small() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(data, out), env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=small
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate()
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(load(IngestConfig, {"workers": 1}, data=str(data), output_dir=str(tmp_path_factory.mktemp("w") / "out")))


def parts(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): m.identity for path, m in mf.find_manifests(out)} | {
        f"{part}/{name}": mf.read_manifest(out / part / name).identity
        for part in ("pool", "holdout")
        for name in ("a", "b")
    }


def any_file(folder: Path, pattern: str, size: int) -> bool:
    return any(path.stat().st_size >= size for path in folder.glob(pattern))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "begun": lambda out: (out / ".work" / "spool").is_dir(),
    "in the middle of reading": lambda out: any_file(out, ".work/spool/*.rows", 2 << 20),
    "begun to write": lambda out: any_file(out, ".work/staging/pool/*/*.parquet", 4),
    "in the middle of writing": lambda out: any_file(out, ".work/staging/pool/b/*.parquet", 1 << 20),
    "the manifests": lambda out: (out / ".work" / "staging" / "pool" / "manifest.json").is_file(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_starts_again_and_gives_the_same(data: Path, whole: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    for _ in range(5):  # it may be done before it can be killed
        shutil.rmtree(out, ignore_errors=True)
        process = start(data, out)
        while not MOMENTS[moment](out) and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        if process.returncode:
            break
    assert process.returncode, "it was done before it could be killed, five times"
    assert not (out / "manifest.json").exists()
    code, said = finish(start(data, out))
    assert code == 0, said
    assert parts(out) == parts(whole)
    assert not (out / ".work").exists()
    assert {path.name for path in out.iterdir()} - {".hydra", "logs"} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(("share", "where"), [(0.1, "spool"), (0.65, "parquet")])
def test_a_full_disk_is_said_in_one_line(data: Path, whole: Path, tmp_path: Path, share: float, where: str) -> None:
    """Each of two workers has half of the texts in its spool; a dataset's Parquet file has half of them, too."""
    out = tmp_path / "out"
    if where == "parquet":  # one dataset: its file is larger than either spool
        data = Path(shutil.copytree(data, tmp_path / "one" / "c")).parent
    code, said = finish(start(data, out, int(share * ROWS * 1100)))
    assert code == 1
    last = said.splitlines()[-1]
    assert "cannot be written (File too large): make room, and give the same command again" in last
    assert where in last
    assert "Traceback" not in said
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".work/spool/*")), "what is large is not left on a full disk"
    if where == "spool":
        assert finish(start(data, out))[0] == 0
        assert parts(out) == parts(whole)


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    config = load(IngestConfig, {"holdout": 0}, data=str(path), output_dir=str(tmp_path / "out"))
    real = intake.read

    def read(task: intake.Task) -> intake.Found:
        found = real(task)
        path.write_text(path.read_text() * 2)
        return found

    monkeypatch.setattr(intake, "read", read)
    with pytest.raises(UserError, match=r"x\.jsonl was changed while it was read: start again"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_what_is_lost_on_the_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"prompt": f"a {n}", "completion": "b"}) + "\n" for n in range(50))
    (tmp_path / "x.jsonl").write_text(lines)
    config = load(IngestConfig, {"holdout": 5}, data=str(tmp_path / "x.jsonl"), output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(stage.pool_files, "write", lambda task: stage.pool_files.Written(task.path, 1, 0, "x", None))
        with pytest.raises(RuntimeError, match="50 rows were to be written, 2 were: rows were lost"):
            run(config)
    with monkeypatch.context() as patch:
        real = stage.divide

        def damaging(*given):  # type: ignore[no-untyped-def]
            rows = tmp_path / "out" / ".work" / "spool" / "0.rows"
            rows.write_bytes(rows.read_bytes().replace(b"a 7", b"a 8"))
            return real(*given)

        patch.setattr(stage, "divide", damaging)
        with pytest.raises(RuntimeError, match="is not what was read"):
            run(config)
    with monkeypatch.context() as patch:
        patch.setattr("selectmoe.spool.Spool.add", lambda *_: None)
        with pytest.raises(RuntimeError, match="rows were lost"):
            run(config)
    assert run(config) == tmp_path / "out"


def test_a_killed_worker_ends_the_stage_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(IngestConfig, {"workers": 2}, data=str(data), output_dir=str(tmp_path / "out"))
    real = stage.Workers.map

    def doomed(self: stage.Workers, function, tasks):  # type: ignore[no-untyped-def]
        for n, result in enumerate(real(self, function, tasks)):
            if n == 0:
                for child in self._children:
                    child.kill()
            yield result

    monkeypatch.setattr(stage.Workers, "map", doomed)
    with pytest.raises(Unavailable, match=r"a worker process was killed \(signal SIGKILL\)"):
        run(config)
    monkeypatch.undo()
    assert mf.read_manifest(run(config)).rows["in"] == ROWS
