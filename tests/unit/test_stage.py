"""pytest tests/unit/test_stage.py"""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from selectmoe import manifest as mf
from selectmoe import stage
from selectmoe.config import StageConfig, execution, identity
from selectmoe.errors import UserError


@dataclass
class Config(StageConfig):
    k: int = identity(1, doc="k")
    workers: int = execution(1, doc="w")


def work(path, source, **fields):
    config = Config(output_dir=str(path), **fields)
    with stage.begin("toy", 1, config, inputs={"source": str(source), "absent": ""}) as out:
        if not out.done:
            (out.staging / "result.txt").write_text(f"{config.k}")
            out.metric("loss", 0.5, step=1)
            out.commit(rows_in=3, rows_out=2, dropped={"empty": 1, "none": 0})
        return out.done


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.txt"
    path.write_text("rows")
    return path


def test_finished_work_is_found_again(tmp_path, source):
    assert work(tmp_path / "o", source) is False
    assert work(tmp_path / "o", source, workers=4) is True
    found = mf.read_manifest(tmp_path / "o")
    assert found.rows == {"in": 3, "out": 2, "dropped": {"empty": 1}}
    assert list(found.inputs) == ["source"]
    assert not (tmp_path / "o" / ".work").exists()


def test_another_runs_output_is_refused_with_the_difference(tmp_path, source):
    work(tmp_path / "o", source)
    with pytest.raises(UserError, match="k 1 there, 2 here"):
        work(tmp_path / "o", source, k=2)
    source.write_text("other rows")
    with pytest.raises(UserError, match="input source"):
        work(tmp_path / "o", source)


def test_a_stage_that_trains_nothing_runs_in_one_process(tmp_path, source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="toy runs in one process, but torchrun started 4"):
        work(tmp_path / "o", source)
    assert not (tmp_path / "o").exists()


def test_the_output_is_a_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="output_dir=s3://b/o must be a folder"):
        work("s3://b/o", source)


def test_foreign_files_are_left_alone(tmp_path, source):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.txt"):
        work(tmp_path / "o", source)
    assert (tmp_path / "o" / "mine.txt").read_text() == "precious"


def test_a_users_mistake_leaves_nothing(tmp_path, source):
    with pytest.raises(UserError), stage.begin("toy", 1, Config(output_dir=str(tmp_path / "o"))) as out:
        out.work.put_bytes("a", b"1")
        raise UserError("wrong")
    assert not (tmp_path / "o").exists()


def test_lost_rows_are_an_error(tmp_path):
    with (
        pytest.raises(RuntimeError, match="rows were lost"),
        stage.begin("toy", 1, Config(output_dir=str(tmp_path / "o"))) as out,
    ):
        out.commit(rows_in=3, rows_out=1, dropped={"empty": 1})


def test_killed_work_is_resumed(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_stage import *\n"
        "with stage.begin('toy', 1, Config(output_dir=sys.argv[1])) as out:\n"
        "    out.work.put_bytes('half', b'done')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = str(tmp_path / "o")
    done = subprocess.run([sys.executable, "-c", code, folder, __file__.rsplit("/", 1)[0]], check=False)
    assert done.returncode == -9
    with stage.begin("toy", 1, Config(output_dir=folder)) as out:
        assert out.work.get("half") == b"done"
        out.commit()
    assert mf.read_manifest(folder).stage == "toy"


def test_spec7_42_a_commit_killed_before_its_manifest_is_done_again(tmp_path, source):
    folder = tmp_path / "o"
    with stage.begin("toy", 1, Config(output_dir=str(folder)), inputs={"source": str(source)}) as out:
        (out.staging / "result.txt").write_text("half")
        (out.staging / "result.txt").rename(folder / "result.txt")  # as commit does, then the power goes
    with pytest.raises(UserError, match=r"no manifest\.json"):
        mf.read_manifest(folder)
    assert work(folder, source) is False
    assert (folder / "result.txt").read_text() == "1"


def test_a_part_has_a_manifest_of_its_own(tmp_path):
    with stage.begin("toy", 1, Config(output_dir=str(tmp_path / "o"))) as out:
        (out.staging / "pool").mkdir()
        (out.staging / "pool" / "x").write_text("x")
        out.part("pool", rows_in=1, rows_out=1)
        out.commit(rows_in=1, rows_out=1)
    assert mf.read_manifest(tmp_path / "o" / "pool").files[0]["path"] == "x"
    assert mf.read_manifest(tmp_path / "o").files == []


def test_inputs_in_any_order(tmp_path, source):
    other = tmp_path / "other.txt"
    other.write_text("more")
    entries = [stage.input_entry([str(a), str(b)])["identity"] for a, b in ((source, other), (other, source))]
    assert entries[0] == entries[1]
