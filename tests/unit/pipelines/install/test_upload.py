"""Registering and starting the pipeline, against the stand-in for KFP: `pytest tests/unit/pipelines/install/test_upload.py`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import kfp_api, submit
from pipelines.install.__main__ import main
from tests.kfp_server import KfpServer

IMAGE = "registry.example.org/select-moe@sha256:"


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    monkeypatch.setattr(kfp_api, "DELAYS", (0.01,))
    with KfpServer() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        monkeypatch.delenv("KF_PIPELINES_TOKEN", raising=False)
        yield server


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """Every profile is compiled once for this file: it takes seconds, and only one thread of a process can."""
    known: dict[str, submit.Compiled] = {}
    compile_it = submit.compiled

    def compiled(profile: str) -> submit.Compiled:
        text = Path(profile).read_text()
        return known.get(text) or known.setdefault(text, compile_it(profile))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit, "compiled", compiled)
        yield


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.yaml"
    path.write_text(f"image: {IMAGE}{'0' * 64}\nparameters: {{work_root: 's3://bucket/work'}}\n")
    return path


def test_registered_once_and_anew_when_the_digest_changed(kfp: KfpServer, profile: Path) -> None:
    assert main(["upload", f"profile={profile}"]) == main(["upload", f"profile={profile}"]) == 0
    (version,) = kfp.versions
    assert kfp.calls.count("POST /pipelines/upload_version") == 1
    profile.write_text(profile.read_text().replace("0" * 64, "1" * 64))
    assert main(["upload", f"profile={profile}"]) == main(["upload", f"profile={profile}"]) == 0
    assert len({item.display_name for item in kfp.versions}) == len(kfp.versions) == 2
    assert kfp.versions[0] is version
    assert len(kfp.pipelines) == 1, "a version of the same pipeline"


def test_two_at_a_time_register_once(kfp: KfpServer, profile: Path) -> None:
    submit.compiled(str(profile))
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(main(["upload", f"profile={profile}", "wait=5"])))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    assert (len(kfp.pipelines), len(kfp.versions)) == (1, 1)


@pytest.mark.parametrize("fault", [503, "drop", "lose"])
@pytest.mark.parametrize("call", ["POST /pipelines$", "POST /pipelines/upload_version"])
def test_a_break_at_any_call(kfp: KfpServer, profile: Path, call: str, fault: int | str) -> None:
    """What a killed Job leaves half done is found by the next one."""
    kfp.faults = [(call, fault)] * 3
    assert main(["upload", f"profile={profile}", "wait=10"]) == 0
    assert (len(kfp.pipelines), len(kfp.versions)) == (1, 1)


def test_an_api_that_stays_away(
    profile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfp_api, "DELAYS", (0.01,))
    assert main(["upload", f"profile={profile}", "endpoint=http://127.0.0.1:9", "wait=0"]) == 1
    assert "http://127.0.0.1:9: no answer" in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_profile_asks_nobody(kfp: KfpServer, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile.write_text("image: select-moe:latest\n")
    assert main(["upload", f"profile={profile}"]) == 2
    assert "can change under its name" in capsys.readouterr().err
    assert not kfp.calls


def test_a_run_is_started_once_per_name(kfp: KfpServer, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", f"profile={profile}", "experiment=site", "preset=tiny", "config=['arms=[selected]']"]
    assert main([*words, "name=r-1", "service_account=pipeline"]) == 0
    (run,) = kfp.runs
    assert capsys.readouterr().out.splitlines()[-1] == run.run_id
    assert run.display_name == "r-1"
    assert run.service_account == "pipeline"
    assert run.runtime_config.parameters["config"] == ["arms=[selected]"]
    assert run.runtime_config.parameters["preset"] == "tiny"
    assert kfp.experiments[-1].display_name == "site"
    assert main([*words, "name=r-1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == run.run_id
    assert kfp.runs == [run], "a Job that is tried again starts nothing"
    assert main([*words, "name=r-2"]) == 0
    assert len(kfp.runs) == 2
    assert len(kfp.versions) == 1


@pytest.mark.parametrize("fault", [503, "drop", "lose"])
def test_a_break_while_starting(kfp: KfpServer, profile: Path, fault: int | str) -> None:
    kfp.faults = [("POST /runs", fault)] * 3
    assert main(["run", f"profile={profile}", "name=r-1", "wait=10"]) == 0
    assert len(kfp.runs) == 1


def test_two_at_a_time_start_one(kfp: KfpServer, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both look, neither sees the other's run, both start one: one of the two stays, and both name it."""
    submit.compiled(str(profile))
    codes: list[int] = []
    both = threading.Barrier(2)
    started = kfp_api.Server.start

    def together(self: kfp_api.Server, run: object) -> str:
        both.wait(30)
        return started(self, run)

    words = ["run", f"profile={profile}", "name=r-1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kfp_api.Server, "start", together)
        threads = [threading.Thread(target=lambda: codes.append(main(words))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert codes == [0, 0]
    (run,) = kfp.runs
    assert kfp.calls.count("POST /runs") == 2
    assert capsys.readouterr().out.splitlines().count(run.run_id) == 2


def test_parameters_that_the_pipeline_does_not_have(
    kfp: KfpServer, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", f"profile={profile}", "name=r", "prest=tiny"]) == 2
    assert "no parameter 'prest'; nearest: preset" in capsys.readouterr().err
    assert main(["run", f"profile={profile}", "name=r", "dry_run=true"]) == 2
    assert "run takes no dry_run=" in capsys.readouterr().err
    assert not kfp.runs


def test_kfp_is_proved_with_the_pods_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KF_PIPELINES_TOKEN", raising=False)
    token = tmp_path / "token"
    token.write_text("right")
    with KfpServer(token="right", namespaces=["team"]) as server:
        words = ["prove", "what=kfp", f"endpoint={server.url}", "namespace=team"]
        assert main([*words, f"token_file={token}"]) == 0
        assert f"{server.url} answers; pipelines that we see: 0" in capsys.readouterr().out
        token.write_text("wrong")
        assert main([*words, f"token_file={token}"]) == 2
        assert "wants to know who you are" in capsys.readouterr().err
