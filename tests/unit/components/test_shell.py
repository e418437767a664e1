"""components/_shell.py: `pytest tests/unit/components/test_shell.py`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from components import _shell
from selectmoe import ingest as ingest_stage
from selectmoe import manifest as mf
from selectmoe import runlog
from selectmoe.errors import Refused
from selectmoe.ingest import IngestConfig


def rows(path: Path, n: int = 40) -> Path:
    path.mkdir(parents=True)
    for name in ("one", "two"):
        with open(path / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(n):
                turns = [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"answer {i}"}]
                file.write(json.dumps({"id": f"{name}-{i}", "messages": turns}) + "\n")
    return path


def ingest(artifact: SimpleNamespace, data: Path, work: Path, code: str = "c") -> None:
    _shell.run("ingest", artifact, '{"holdout": 5}', code, str(work), inputs={"data": str(data)})


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def artifact(path: Path) -> SimpleNamespace:
    return SimpleNamespace(path=str(path), metadata={})


def test_a_stages_output_is_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_shell.EVENTS, str(tmp_path / "events"))
    first, second = artifact(tmp_path / "kfp" / "1"), artifact(tmp_path / "kfp" / "2")
    data = rows(tmp_path / "data")
    ingest(first, data, tmp_path / "work")
    manifest = mf.read_manifest(first.path)
    told = {"stage": "ingest", "identity": manifest.identity, "checksum": manifest.checksum}
    told |= {"rows_in": 80, "rows_out": 80, "bytes": sum(file["bytes"] for file in manifest.files)}
    assert told.items() <= first.metadata.items()
    assert first.metadata["metric_rejected"] == 0.0
    ingest(second, data, tmp_path / "work")
    assert mf.read_manifest(second.path).checksum == manifest.checksum, "finished once, it is not computed again"
    assert [json.loads(line)["stage"] for line in (tmp_path / "events").read_text().splitlines()] == ["ingest"] * 2


def test_changed_code_is_other_work(tmp_path: Path) -> None:
    data, work = rows(tmp_path / "data"), tmp_path / "work"
    for at, code in enumerate(["a", "b"]):
        ingest(artifact(tmp_path / "kfp" / str(at)), data, work, code)
    assert len(list((work / "finished").iterdir())) == 2


def test_a_users_mistake_ends_a_task_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(_shell.EVENTS, str(tmp_path / "events"))
    data = rows(tmp_path / "data")
    with pytest.raises(SystemExit) as end:
        _shell.run("ingest", artifact(tmp_path / "a"), '{"holdot": 5}', "c", str(tmp_path), inputs={"data": str(data)})
    assert end.value.code == 2
    assert "holdot" in capsys.readouterr().err
    last = json.loads((tmp_path / "events").read_text().splitlines()[-1])
    assert (last["stage"], last["exit"]) == ("ingest", 2)
    assert "holdot" in last["message"]


def test_an_answer_that_is_no_is_handed_on_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: IngestConfig) -> Path:
        done(config)
        raise Refused("no")

    done = ingest_stage.run
    monkeypatch.setattr(ingest_stage, "run", refuse)
    result = artifact(tmp_path / "kfp")
    with pytest.raises(SystemExit) as end:
        ingest(result, rows(tmp_path / "data"), tmp_path / "work")
    assert end.value.code == 3
    assert result.metadata["identity"] == mf.read_manifest(result.path).identity


def test_a_checkpoint_is_what_its_digest_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    reference = json.dumps({"uri": str(model), "digest": mf.identity_of(model)})
    assert _shell.checkpoint(reference) == str(model)
    (model / "config.json").write_text("[]")
    gone = json.dumps({"uri": str(tmp_path / "x"), "digest": ""})
    for given, said in ((reference, "has changed"), (gone, "is gone")):
        with pytest.raises(SystemExit) as end:
            _shell.checkpoint(given)
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_linking_takes_nested_outputs_along(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    _shell.link_tree(tmp_path / "a", tmp_path / "z")
    _shell.link_tree(tmp_path / "a", tmp_path / "z")
    assert (tmp_path / "z" / "b" / "c").read_text() == "x"


def test_only_the_oracle_is_told_what_was_planted() -> None:
    assert _shell.planted('{"arms": ["random", "oracle"]}', "/pool") == {"planted": "/pool"}
    assert _shell.planted('{"arms": ["random"]}', "/pool") == {}


def test_rows_that_changed_since_check_are_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path / "data")
    digest = mf.tree_identity(data)
    given = {"inputs": {"data": str(data)}, "unchanged": {str(data): digest}}
    _shell.run("ingest", artifact(tmp_path / "a"), '{"holdout": 5}', "c", str(tmp_path / "work"), **given)
    (data / "three.jsonl").write_bytes((data / "two.jsonl").read_bytes())
    with pytest.raises(SystemExit) as end:
        _shell.run("ingest", artifact(tmp_path / "b"), '{"holdout": 5}', "c", str(tmp_path / "work"), **given)
    assert end.value.code == 2
    assert "has changed since" in capsys.readouterr().err


def test_an_accelerator_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTMOE_RUN_ID", "r")
    hardware = _shell.Hardware("nvidia.com/gpu", 2, "16Gi")
    expected = pytest.raises(RuntimeError, match="torch sees no device")
    with expected, _shell.task("warmup", str(tmp_path), hardware):
        pass
    told = runlog.tell(str(tmp_path), succeeded=False)
    assert told["stage"] == "warmup"
    assert "torch sees no device" in told["reason"]
