"""The bucket, on a real S3 server (nanio): `pytest tests/unit/pipelines/install/test_bucket.py`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.install.__main__ import main
from tests.serving import Quiet, S3Server, Stand


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    made = S3Server(tmp_path_factory.mktemp("s3"))
    yield made
    made.close()


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


def test_made_once(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bucket", "name=once", "wait=5"]) == 0
    (s3.folder / "once" / "kept").write_text("data")
    assert main(["bucket", "name=once", "wait=5"]) == 0
    assert capsys.readouterr().out == "bucket once: made\nbucket once: there already\n"
    assert (s3.folder / "once" / "kept").read_text() == "data"


def test_two_at_a_time(s3: S3Server) -> None:
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(main(["bucket", "name=both", "wait=5"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 4
    assert (s3.folder / "both").is_dir()


def test_an_object_there_and_back(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bucket", "name=proof", "wait=5"]) == 0
    assert main(["prove", "what=s3", "bucket=proof", "wait=5"]) == 0
    assert "an object was written to proof, read and deleted" in capsys.readouterr().out
    assert not [path for path in (s3.folder / "proof").rglob("*proof-*") if path.is_file()]


def test_a_server_that_comes_up_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the hook meets at the first installation: SeaweedFS answers later."""
    (tmp_path / "s3").mkdir()
    here = S3Server(tmp_path / "s3")
    port, refused = here.url.rpartition(":")[2], threading.Event()
    here.close()
    for name, value in here.environment().items():
        monkeypatch.setenv(name, value)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["bucket", "name=late", "wait=60"])))
    thread.start()
    refused.wait(0.5)
    again = S3Server(tmp_path / "s3", port=int(port))
    thread.join()
    again.close()
    assert codes == [0]
    assert "waiting: s3://late: the S3 server at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, ["name=b"], "AWS_SECRET_ACCESS_KEY"),
        ({}, ["name=No_Bucket/x"], "cannot be a place on S3"),
        ({"AWS_ENDPOINT_URL_S3": "http://me:pass@host"}, ["name=b"], "must not hold credentials"),
        ({}, [], "missing: name="),
    ],
)
def test_mistakes(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: dict[str, str],
    words: list[str],
    said: str,
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert main(["bucket", *words, "wait=2"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("status", "code"), [(403, 2), (503, 1)])
def test_somebody_elses_bucket_and_a_server_with_errors(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    class Handler(Quiet):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    stand = Stand(Handler)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", stand.url)
    assert main(["bucket", "name=theirs", "wait=0"]) == code
    assert ("belongs to somebody else" if code == 2 else "answered 503") in capsys.readouterr().err
    stand.close()


def test_a_proof_that_fails(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "what=s3", "bucket=nowhere", "wait=2"]) == 2
    assert "there is no bucket nowhere" in capsys.readouterr().err
    assert main(["prove", "what=s3"]) == 2
